"""Warp-specialised kernels for Hopper (H100, H200) of the contract in ringflash.kernels.reference, in Triton's Gluon.

Read in the order the data takes: widths (blocks for which head dimensions), checks (what is refused), descriptors
(tensors as the hardware takes them), blocks (of rows, to and from shared memory), rings (of stages there), schedule
(which tile when), sink_tokens (which keys beside), listed_blocks (which blocks in place of a range), score_changes and
dropout (modifiers), softmax, fp32_rows (rows in fp32 between memory and registers), forward_work (what is loaded, and
where to), forward_steps (of the key loop), forward_result (how a tile leaves), forward_kernel and forward (the kernel
and its launch); backward_tiles (sizes), backward_rows (what rows need beside queries, backward), backward_order,
backward_tokens, rows_visited and backward_work (what a program works on), dquery_accumulate (how the query's gradient
leaves it) and dquery_in_turn (in which order, where it has to repeat), backward_programs (what a launch takes of the
intervals), backward_kernel, backward_wide_kernel, backward_split_kernel and backward; narrow_kernels and narrow (rows
that see few keys); widest_work, widest_forward_kernel, widest_backward_kernel and widest (all of that at head dimension
512); compat holds what differs between triton's versions.
"""

from ringflash.kernels.gpu.add_rows import add_rows
from ringflash.kernels.gpu.row_delta import row_delta
from ringflash.kernels.gpu.sink_gradient import sink_gradient
from ringflash.kernels.hopper.backward import attend_backward, whole_backward
from ringflash.kernels.hopper.checks import supports
from ringflash.kernels.hopper.forward import attend

__all__ = ["add_rows", "attend", "attend_backward", "row_delta", "sink_gradient", "supports", "whole_backward"]
