"""Tensors as the tensor memory engine takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflash.kernels.gpu.launcher import Description, description_of

GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


def addressable(x: Tensor) -> Tensor:
    """`x` (rows, heads, dim) itself where the tensor memory engine can address it, otherwise a contiguous copy.

    It takes addresses and strides of whole 16 bytes, and coordinates of 32 bits: head h begins at column h * stride.
    """
    strides = [stride * x.element_size() for stride in x.stride()[:2]]
    aligned = x.data_ptr() % 16 == 0 and strides[0] > 0 and all(stride % 16 == 0 for stride in strides)
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    if aligned and x.stride(2) == 1 and width < 2**31:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # .contiguous() may be x itself, at its address


def boxable(x: Tensor) -> Tensor:
    """`addressable`, and a copy where all heads are one row: they are a dimension of boxes, see `box_descriptor`."""
    return addressable(x) if x.stride(1) else x.clone(memory_format=torch.contiguous_format)


def addressable_carry(carry_out: Tensor) -> Tensor:
    """A contiguous tensor at an address of whole 16 bytes: a carry is described by its shape alone."""
    carry_out = carry_out.contiguous()
    return carry_out if carry_out.data_ptr() % 16 == 0 else carry_out.clone()


Operands = tuple[Tensor, ...]


def made_addressable(
    operands: Operands, made: Callable[[Tensor], Tensor] = addressable
) -> tuple[Operands, Callable[[Operands], Operands]]:
    """Operands of a first call as the engine takes them, and what makes so those of calls alike.

    Whether these need copies the first call tells. Nothing is held of its tensors: what is kept for calls alike must
    not keep them alive.

    Args:
        operands: of the first call.
        made: what makes one of them addressable.
    """
    first = tuple(map(made, operands))
    if all(x is y for x, y in zip(operands, first, strict=True)):
        return first, tuple  # which gives a tuple itself, without a call in Python
    return first, lambda operands: tuple(map(made, operands))


def descriptor(x: Tensor, rows: int, columns: int, padded: bool = False) -> TensorDescriptor:
    """Blocks of (rows, columns) of one head of an addressable (rows, heads, dim) tensor; see `blocks`.

    Head h's columns are h * head stride onwards of one long row, so any strides are two dimensions. It has three,
    (heads, rows, dim), where blocks reach beyond a head's columns, `padded`. Rows and columns behind the last are read
    as zeros and not written.
    """
    row_count, heads, dim = x.shape
    if padded:
        layout = block_layout(rows, columns, x.dtype, heads=True)
        strides = [x.stride(1), x.stride(0), 1]
        return TensorDescriptor(x, [heads, row_count, dim], strides, [1, rows, columns], layout)
    width = (heads - 1) * x.stride(1) + dim
    return TensorDescriptor(
        x, [row_count, width], [x.stride(0), 1], [rows, columns], block_layout(rows, columns, x.dtype)
    )


def box_descriptor(x: Tensor, rows: int, heads: int, columns: int) -> TensorDescriptor:
    """Boxes of rows of several neighbouring heads of an addressable (rows, heads, dim) tensor.

    In shared memory the heads of a row follow each other, as one row of a head after another. Rows, heads and columns
    behind the last are read as zeros and not written.
    """
    layout = gl.NVMMASharedLayout.get_default_for([rows, heads, columns], GLUON_DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), [x.stride(0), x.stride(1), 1], [rows, heads, columns], layout)


def part_descriptors(
    x: Tensor, rows: int, parts: tuple[int, ...], stored: tuple[int, ...] | None = None
) -> list[Description | None]:
    """Descriptions of blocks of a head's columns: their first part and the rest, None if there is none.

    Args:
        x: as in `descriptor`.
        rows: of a block.
        parts: columns, which together are all of a head's or more.
        stored: columns that are moved at a time of each part; all if None.
    """
    padded = sum(parts) > x.shape[2]
    found: list[Description | None] = [description_of(descriptor(x, rows, part, padded)) for part in stored or parts]
    return [*found, None][:2]


def list_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Blocks of a flat tensor of float32."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [block], layout)


def without_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without memory, to describe those by that each call allocates."""
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def block_layout(rows: int, columns: int, dtype: torch.dtype, heads: bool = False) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory: swizzled as the tensor cores read it; with a dimension of heads if asked."""
    return gl.NVMMASharedLayout.get_default_for([1] * heads + [rows, columns], GLUON_DTYPES[dtype])
