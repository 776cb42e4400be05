"""Warp-specialised kernels for Hopper (H100, H200) of the contract in ringflash.kernels.reference, in Triton's Gluon.

Read in the order the data takes: operands (what the kernels apply to, and tensors as the hardware takes them), schedule
(which tile when), forward_kernel and forward (the kernel and its launch), turns (the order of deterministic
gradients), backward_kernel and backward; compat holds what differs between triton's versions.
"""

from ringflash.kernels.hopper.backward import attend_backward, row_delta
from ringflash.kernels.hopper.forward import attend
from ringflash.kernels.hopper.operands import supports, supports_intervals

__all__ = ["attend", "attend_backward", "row_delta", "supports", "supports_intervals"]
