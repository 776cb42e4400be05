"""The contracts of kernels/reference.py and kernels/decode.py in torch operators, for CPUs and wherever Triton is not.

blockwise cuts what is visible into rectangles and computes each by rectangle_attention; decode is attention to a cache.
"""
