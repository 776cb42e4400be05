"""The contract of ringflash.kernels.reference in Triton.

Read in the order the data takes: checks (what is refused), tile_sizes (by chip), descriptors (tensors as kernels take
them), key_stretches (the walk over keys), modify_scores (softcap, ALiBi, dropout, padding), prepared_kernel (what is
worked out once), forward, backward_kernels and backward.
"""

from ringflash.kernels.gpu.add_rows import add_rows
from ringflash.kernels.gpu.row_delta import row_delta
from ringflash.kernels.gpu.sink_gradient import sink_gradient
from ringflash.kernels.triton.attend.backward import attend_backward
from ringflash.kernels.triton.attend.checks import missing
from ringflash.kernels.triton.attend.forward import attend

__all__ = ["add_rows", "attend", "attend_backward", "missing", "row_delta", "sink_gradient"]
