"""Launches of compiled programs without Triton's own way there, which must come to the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from stand_in import StandIn, stand_in
from triton.compiler.compiler import LazyDict
from triton.runtime.jit import JITFunction

from ringflash.kernels import triton as kernels
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.modifiers import Modifiers

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

ROWS = 64


@pytest.fixture
def driver() -> Iterator[StandIn]:
    with stand_in() as driver:
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


def call(intervals: KeyIntervals, scale: float, dim: int, carried: bool, modifiers: Modifiers | None) -> None:
    """Forward and backward with new tensors."""
    query, key = torch.empty(ROWS, 4, dim, dtype=torch.bfloat16), torch.empty(ROWS, 2, dim, dtype=torch.bfloat16)
    lse, sums = torch.empty(4, ROWS), torch.empty(ROWS, 4, dim)
    keywords = {"scale": scale, "modifiers": modifiers}
    out, _ = kernels.attend(query, key, key, intervals, carry=(sums, lse) if carried else None, **keywords)
    delta = kernels.row_delta(out, out, lse if carried else None)
    kernels.attend_backward(
        out, query, key, key, lse, delta, intervals, carry=torch.empty_like(sums) if carried else None, **keywords
    )


def shown(x: object) -> object:
    """A launch's argument without the address, which is another in every call."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.data_ptr() % 16
    if hasattr(x, "block_shape"):
        return shown(x.base), x.shape, x.strides, x.block_shape, x.padding
    if isinstance(x, LazyDict):  # for hooks around launches
        return x.data
    return type(x)(*map(shown, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else x


@pytest.mark.parametrize("form", [plain(64), plain(128), with_everything()], ids=["D64", "D128", "everything"])
def test_repeated_launches_hand_the_driver_what_tritons_own_launches_do(driver: StandIn, form: dict) -> None:
    call(**form)
    by_triton, driver.launches = driver.launches, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", None)
        call(**form)
    assert len(by_triton) == 4
    for own, direct in zip(by_triton, driver.launches, strict=True):
        assert [*map(shown, own)] == [*map(shown, direct)]


def test_descriptors_hold_the_addresses_of_their_own_call(driver: StandIn) -> None:
    """Tensors of one form at two addresses."""
    tensors = [torch.empty(ROWS, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    for x in (*tensors, *tensors):
        kernels.attend(x, x, x, causal_intervals(ROWS, ROWS), scale=1.0)
    found = [next(y.base for y in launch if hasattr(y, "base")) for launch in driver.launches]
    assert all(x is y for x, y in zip(found, (*tensors, *tensors), strict=True))


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
