"""The training recipe that `launch/train.py` runs, each folder standing on the ones before it.

memory: what is kept of a decoder's blocks for the backward pass, and where. model: the decoder and its loss. corpus:
from text to packed batches. engines: how parameters, gradients and optimizer state live on the ranks. checkpoint: what
is kept of them on disk. config: from YAML and overrides to checked values. run: all of it together, step by step.
"""
