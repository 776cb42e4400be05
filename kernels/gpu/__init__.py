"""What the GPU implementations share: Triton's for all chips (kernels/triton) and Hopper's own (kernels/hopper).

chips tells GPUs apart, launcher launches compiled kernels at little cost, row_blocks reads and writes blocks of rows,
and row_delta is the one kernel that both use.
"""
