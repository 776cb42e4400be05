"""Tensors as the kernels' load_block takes them: by pointers, or by descriptors for the tensor memory engine."""

from __future__ import annotations

from torch import Tensor

from ringflash.kernels.gpu.launcher import Description, description_of
from ringflash.kernels.gpu.row_blocks import padded
from triton.tools.tensor_descriptor import TensorDescriptor


def describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory engine can address these (rows, heads, columns) tensors."""
    return all(
        x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in tensors
    )


def described(x: Tensor, block: int) -> Description:
    """What a describable (rows, heads, columns) tensor's descriptor is of, for blocks of `block` rows."""
    rows, heads, dim = x.shape
    row_stride, head_stride, _ = x.stride()
    checked = TensorDescriptor(x, [heads, rows, dim], [head_stride, row_stride, 1], [1, block, padded(dim)])
    return description_of(checked)
