"""What the launchers share: whether the kernels apply, and tensors as the tensor memory engine takes them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflash.errors import ArgumentError
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers

HEAD_DIMS = (64, 128, 256)
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
CACHED_KEYS = 32 * 2**20
"""Bytes of keys and values that one section of heads may take of the 50 MB of second-level cache."""


def supports(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, value_head_dim: int | None = None
) -> str | None:
    """None where the kernels of this package run, otherwise the reason in words why they do not.

    Example:
        >>> supports("cpu", torch.bfloat16, 128)
        'device is cpu; it takes NVIDIA GPUs of compute capability 9.0'
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        return f"device is {device}; it takes NVIDIA GPUs of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"device has compute capability {capability[0]}.{capability[1]}; it takes 9.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"query is {dtype}; it takes float16 and bfloat16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim}; it takes {', '.join(map(str, HEAD_DIMS))}"
    if value_head_dim not in (None, head_dim):
        return f"value_head_dim={value_head_dim}; it takes that of query and key, {head_dim}"
    return None


def check_operands(
    query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, scale: float, modifiers: Modifiers | None
) -> None:
    """Raise ArgumentError for what the kernels cannot compute."""
    if modifiers is not None:
        raise ArgumentError(f"modifiers={modifiers}; the Hopper kernels apply none, triton and blockwise apply all")
    if intervals.has_sink:
        raise ArgumentError("intervals have sink ranges; the Hopper kernels take none, triton and blockwise do")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ArgumentError(f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; all three must agree")
    if query.shape[1] % key.shape[1] or value.shape[:2] != key.shape[:2] or key.shape[2] != query.shape[2]:
        raise ArgumentError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; allowed are "
            "(T, H, D), (S, Hk, D), (S, Hk, D) with H a multiple of Hk"
        )
    if missing := supports(query.device, query.dtype, query.shape[2], value.shape[2]):
        raise ArgumentError(f"kernel='hopper' cannot run: {missing}")
    if intervals.query_count != query.shape[0] or intervals.key_count != key.shape[0]:
        raise ArgumentError(
            f"intervals are for {intervals.query_count} query and {intervals.key_count} key rows; "
            f"query has {query.shape[0]}, key has {key.shape[0]}"
        )
    if not 0.0 < scale < float("inf"):
        raise ArgumentError(f"scale={scale}; allowed are positive finite numbers")


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


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks of (rows, columns) of one head of an addressable (rows, heads, dim) tensor.

    Head h's columns are h * head stride onwards of one long row, so any strides are two dimensions. Rows behind the
    last are read as zeros and not written.
    """
    row_count, heads, dim = x.shape
    width = (heads - 1) * x.stride(1) + dim
    return TensorDescriptor(
        x, [row_count, width], [x.stride(0), 1], [rows, columns], block_layout(rows, columns, x.dtype)
    )


def list_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Blocks of a flat tensor of float32."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [block], layout)


Form = dict[str, object]
"""All that a descriptor holds but the tensor."""


def form_of(found: TensorDescriptor) -> Form:
    """What other tensors of the form of `found`'s are described with, see `descriptor_of`."""
    return {**vars(found), "base": None}


def descriptor_of(x: Tensor, form: Form) -> TensorDescriptor:
    """A tensor's descriptor, as `descriptor` makes it, for a form that has been checked.

    A descriptor holds an address, so each call makes its own.
    """
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(form, base=x)
    return found


def unplaced(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without memory, to describe those by that each call allocates."""
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def block_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory: swizzled as the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_DTYPES[dtype])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs that fill the device once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def head_section(key_rows: int, key_heads: int, group: int, dim: int) -> int:
    """Query heads whose keys and values fit in the second-level cache together; whole groups, dividing all heads."""
    fitting = max(1, CACHED_KEYS // max(1, key_rows * dim * 4))
    return group * max(n for n in range(1, key_heads + 1) if key_heads % n == 0 and n <= fitting)
