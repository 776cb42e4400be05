"""The Hopper kernels compile for sm_90 without a GPU and stay within registers, shared memory and instruction order."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from hopper_aot import Compiled, catch, compile_call

from ringflash.kernels.hopper import backward, forward
from ringflash.kernels.intervals import causal_intervals

SHARED_LIMIT = 232448


def compile_forward(
    dim: int, tiles: forward.ForwardTiles, dtype: torch.dtype, carry: bool, out_dtype: torch.dtype
) -> Compiled:
    query = torch.empty(1000, 8, dim, dtype=dtype, device="meta")
    key = torch.empty(1200, 2, dim, dtype=dtype, device="meta")
    state = (torch.empty(1000, 8, dim, device="meta"), torch.empty(8, 1000, device="meta")) if carry else None

    def launch():
        intervals = causal_intervals(1000, 1200, "meta")
        prepared = forward.PreparedForward(query, key, key, intervals, 0.1, state, out_dtype, tiles)
        prepared(query, key, key, intervals, state)

    with mock.patch.object(forward, "multiprocessors", return_value=132):
        return compile_call(catch(forward, "attend_kernel", launch))


def compile_backward(
    dim: int, tiles: backward.BackwardTiles, dtype: torch.dtype, dkey_dtype: torch.dtype, deterministic: bool
) -> Compiled:
    query = torch.empty(1000, 8, dim, dtype=dtype, device="meta")
    key = torch.empty(1200, 2, dim, dtype=dtype, device="meta")
    numbers = torch.empty(8, 1000, device="meta")

    def launch():
        operands, sums = (query, query, key, key), (numbers, numbers, None)
        prepared = backward.PreparedBackward(operands, sums, 0.1, dkey_dtype, tiles, deterministic)
        prepared(operands, sums, causal_intervals(1000, 1200, "meta"), dtype)

    name = "attend_backward_wide_kernel" if dim == 256 else "attend_backward_kernel"
    with mock.patch.object(backward, "prepare_rows", return_value=(numbers, numbers)):
        return compile_call(catch(backward, name, launch))


def softmax_before_wait(blocks: dict[str, list[str]]) -> int:
    """Loops in which a block with the softmax is left before the block that waits for all outstanding products."""
    found = 0
    for here, following in itertools.pairwise(blocks):
        softmax = blocks[here].count("MUFU.EX2") >= 16 and not any("DEPBAR 0x0" in x for x in blocks[here])
        found += softmax and bool(blocks[following]) and blocks[following][0] == "WARPGROUP.DEPBAR 0x0"
    return found


# Shapes that docs/benchmarks/hopper.py compares with those in use; they must go on compiling as well.
FORWARD_SHAPES = [
    *forward.FORWARD_TILES.items(),
    ("64", replace(forward.FORWARD_TILES["64"], consumers=2, registers=(240, 24))),
]


# Bytes a thread may spill: next to none, once a tile.
@pytest.mark.parametrize(("dim", "tiles"), FORWARD_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("carry", "out_dtype"),
    [(False, torch.bfloat16), (False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=["plain", "first carry", "carry", "last carry"],
)
def test_forward_fits_and_keeps_the_softmax_before_the_wait(dim, tiles, carry, out_dtype):
    compiled = compile_forward(dim, tiles, torch.bfloat16, carry, out_dtype)
    assert compiled.warnings == []
    assert compiled.spilled <= 64
    assert compiled.shared < SHARED_LIMIT
    assert softmax_before_wait(compiled.blocks) == tiles.consumers, "one loop in each warpgroup"


# Two accumulators for keys and values fill most of the registers; what spills is read once a step or less.
@pytest.mark.parametrize(("dim", "tiles"), backward.BACKWARD_TILES.items(), ids=str)
@pytest.mark.parametrize(
    ("dkey_dtype", "deterministic"),
    [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)],
    ids=["plain", "float32", "deterministic"],
)
def test_backward_fits(dim, tiles, dkey_dtype, deterministic):
    compiled = compile_backward(dim, tiles, torch.bfloat16, dkey_dtype, deterministic)
    assert compiled.warnings == []
    assert compiled.spilled <= {64: 64, 128: 80, 256: 192}[dim]
    assert compiled.shared < SHARED_LIMIT
