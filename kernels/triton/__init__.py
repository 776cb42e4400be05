"""Portable Triton kernels of the contract in ringflash.kernels.reference: NVIDIA since Ampere, and AMD CDNA.

Read in the order the data takes: tiles (which shapes for which chip), operands (checks and views of the tensors),
blocks (loading and masking one block), modifiers (softcap, ALiBi, dropout, padding), launch and tile_plan (what is
worked out once), forward, delta, backward_kernels and backward.
"""

from ringflash.kernels.triton.backward import attend_backward
from ringflash.kernels.triton.delta import row_delta
from ringflash.kernels.triton.forward import attend

__all__ = ["attend", "attend_backward", "row_delta"]
