"""Launches of compiled programs without Triton's own way there, which must come to the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
from stand_in import StandIn, stand_in
from triton.compiler.compiler import LazyDict
from triton.runtime.jit import JITFunction

from ringflash.kernels import hopper
from ringflash.kernels.hopper.forward import ZEROS, zero_of
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton import attend as kernels

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

ROWS = 64


@pytest.fixture
def driver() -> Iterator[StandIn]:
    with stand_in(by_driver=False) as driver:
        yield driver


def every_modifier() -> Modifiers:
    position = torch.arange(ROWS, dtype=torch.int32)
    seed, visible = torch.tensor([3]), torch.ones(ROWS, dtype=torch.uint8)
    return Modifiers(30.0, torch.rand(4).expand(ROWS, 4), 0.1, seed, position, position, visible)


def plain(dim: int) -> dict:
    return {"intervals": causal_intervals(ROWS, ROWS), "scale": 1.0, "dim": dim, "carried": False, "modifiers": None}


def with_everything() -> dict:
    intervals = causal_intervals(ROWS, ROWS)
    sink = torch.zeros(ROWS, dtype=torch.int32)
    intervals = KeyIntervals(intervals.start, intervals.stop, ROWS, sink, sink)
    return {"intervals": intervals, "scale": 0.5, "dim": 72, "carried": True, "modifiers": every_modifier()}


def call(
    intervals: KeyIntervals,
    scale: float,
    dim: int,
    carried: bool,
    modifiers: Modifiers | None,
    kernels: ModuleType = kernels,
    deterministic: bool = False,
) -> None:
    """Forward and backward with new tensors."""
    query, key = torch.empty(ROWS, 4, dim, dtype=torch.bfloat16), torch.empty(ROWS, 2, dim, dtype=torch.bfloat16)
    lse, sums = torch.empty(4, ROWS), torch.empty(ROWS, 4, dim)
    keywords = {"scale": scale, "modifiers": modifiers}
    out, _ = kernels.attend(query, key, key, intervals, carry=(sums, lse) if carried else None, **keywords)
    delta = kernels.row_delta(out, out, lse if carried else None)
    kernels.attend_backward(
        out, query, key, key, lse, delta, intervals, carry=torch.empty_like(sums) if carried else None,
        deterministic=deterministic, **keywords,
    )  # fmt: skip


def shown(x: object) -> object:
    """A launch's argument without the address, which is another in every call."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.data_ptr() % 16
    if hasattr(x, "block_shape"):
        return shown(x.base), x.shape, x.strides, x.block_shape, x.padding
    if isinstance(x, LazyDict):  # for hooks around launches
        return x.data
    return type(x)(*map(shown, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else x


@pytest.mark.parametrize(
    "form",
    [
        plain(64),
        plain(128),
        with_everything(),
        plain(64) | {"kernels": hopper},
        plain(128) | {"kernels": hopper, "carried": True, "deterministic": True},
        plain(256) | {"kernels": hopper},
        plain(64) | {"kernels": hopper, "intervals": replace(causal_intervals(ROWS, ROWS), band=ROWS)},
    ],
    ids=["D64", "D128", "everything", "hopper D64", "hopper D128, everything", "hopper D256", "hopper, narrow"],
)
def test_repeated_launches_hand_the_driver_what_tritons_own_launches_do(driver: StandIn, form: dict) -> None:
    call(**form)
    by_triton, driver.launches = driver.launches, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", None)
        call(**form)
    assert len(by_triton) == 4
    for own, direct in zip(by_triton, driver.launches, strict=True):
        assert [*map(shown, own)] == [*map(shown, direct)]


@pytest.mark.parametrize("kernels", [kernels, hopper], ids=["triton", "hopper"])
def test_descriptors_hold_the_addresses_of_their_own_call(driver: StandIn, kernels: ModuleType) -> None:
    """Tensors of one form at two addresses."""
    tensors = [torch.empty(ROWS, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    for x in (*tensors, *tensors):
        kernels.attend(x, x, x, causal_intervals(ROWS, ROWS), scale=1.0)
    found = [next(y.base for y in launch if hasattr(y, "base")) for launch in driver.launches]
    assert all(x is y for x, y in zip(found, (*tensors, *tensors), strict=True))


def test_operands_out_of_the_engines_reach_are_copied_in_every_call(driver: StandIn) -> None:
    """Forms that differ in which operand is at an odd address, or in strides of which only some are whole 16 bytes."""

    def at(offset: int) -> torch.Tensor:
        return torch.zeros(ROWS * 128 + offset, dtype=torch.bfloat16)[offset:].view(ROWS, 2, 64)

    wide = torch.zeros(ROWS, 2, 68, dtype=torch.bfloat16)[..., :64]
    intervals = causal_intervals(ROWS, ROWS)
    for operands in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        query, key, value = map(at, operands)
        for x, y in ((query, key), (wide, key), (query, wide)):
            for _ in range(2):
                out, lse = hopper.attend(x, y, value, intervals, scale=1.0)
                hopper.attend_backward(out, x, y, value, lse, lse, intervals, scale=1.0)
    for launch in driver.launches:
        for described in (y for y in launch if hasattr(y, "block_shape")):
            assert described.base.data_ptr() % 16 == 0
            if described.base.dim() == 3:
                rows, heads, dim = described.base.shape
                row_stride, head_stride, _ = described.base.stride()
                assert row_stride * 2 % 16 == head_stride * 2 % 16 == 0
                assert described.shape == [rows, (heads - 1) * head_stride + dim]
                assert described.strides == [row_stride, 1]
    assert len(driver.launches) == 4 * 3 * 2 * 3


def test_portable_kernels_describe_no_operand_at_an_odd_address(driver: StandIn) -> None:
    """Also behind a call of the same form that had another tensor, which has no descriptor, at such an address."""
    odd_lse, intervals = torch.zeros(1 + 2 * ROWS)[1:].view(2, ROWS), causal_intervals(ROWS, ROWS)
    for offset in (0, 1, 0):
        x = torch.zeros(ROWS * 128 + offset, dtype=torch.bfloat16)[offset:].view(ROWS, 2, 64)
        kernels.attend(x, x, x, intervals, scale=1.0, carry=(x.float(), odd_lse), out_dtype=torch.float32)
        kernels.attend_backward(x, x, x, x, odd_lse, odd_lse, intervals, scale=1.0)
    described = [[y.base.data_ptr() % 16 for y in launch if hasattr(y, "block_shape")] for launch in driver.launches]
    assert [len(x) for x in described] == [3, 4, 4, 0, 0, 0, 3, 4, 4]
    assert not any(map(any, described))


@pytest.mark.parametrize("offset", [1, 8])
def test_tensors_at_other_addresses_get_a_program_that_takes_them(driver: StandIn, offset: int) -> None:
    def attend(offset: int) -> object:
        storage = torch.empty(ROWS * 64 + offset, dtype=torch.bfloat16)
        x = storage[offset:].view(ROWS, 1, 64)
        kernels.attend(x, x, x, causal_intervals(ROWS, ROWS), scale=1.0)
        return driver.launches[-1][4]  # the program

    programs = [attend(0), attend(0), attend(offset), attend(offset), attend(0)]
    aligned = offset * 2 % 16 == 0
    assert programs[0] == programs[1] == programs[4]
    assert programs[2] == programs[3]
    assert (programs[0] == programs[2]) == aligned


def test_zeros_are_handed_out_once() -> None:
    zeros = [zero_of(torch.device("cpu")) for _ in range(2 * ZEROS + 1)]
    assert len({x.data_ptr() for x in zeros}) == len(zeros)
    assert all(x.data_ptr() % 16 == 0 and x[0] == 0 for x in zeros)
    assert len({x.untyped_storage().data_ptr() for x in zeros}) in (3, 4)


@pytest.mark.gpu
def test_launches_on_several_streams_and_in_graphs_draw_their_own_tickets() -> None:
    if missing := hopper.supports("cuda", torch.bfloat16, 64):
        pytest.skip(missing)
    query = torch.randn(4000, 8, 64, dtype=torch.bfloat16, device="cuda")
    intervals = causal_intervals(4000, 4000, "cuda")

    def attend() -> torch.Tensor:
        return hopper.attend(query, query, query, intervals, scale=0.125)[0]

    expected = attend()
    portable = kernels.attend(query, query, query, intervals, scale=0.125)[0]
    torch.testing.assert_close(expected, portable, atol=0.02, rtol=0.02)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(ZEROS + 1):
        for stream in (torch.cuda.default_stream(), *streams):
            with torch.cuda.stream(stream):
                found.append(attend())
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in found)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [attend() for _ in range(2)]
    for _ in range(3):
        for x in found:
            x.zero_()
        graph.replay()
        assert all(torch.equal(x, expected) for x in found)
