"""What the Hopper package hands to its kernels, for random problems and without a GPU: kernels are noted, not run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import any_blocks, any_intervals, any_modifiers, with_blocks
from stand_in import stand_in
from torch import Tensor
from triton.runtime.jit import JITFunction

from ringflash.errors import ArgumentError
from ringflash.kernels import hopper
from ringflash.kernels.hopper import narrow
from ringflash.kernels.hopper.widths import WIDEST, WIDTHS, width_of
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

PROCESSORS = 132


@dataclass(frozen=True)
class Noted:
    """A launch: kernel, number of programs, and arguments by their names in the kernel."""

    kernel: str
    programs: int
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@contextmanager
def launches_noted() -> Iterator[list[Noted]]:
    """Launches on the stand-in for an H100 while this lasts, none of which is compiled."""
    found: list[Noted] = []

    def note(kernel: JITFunction, *arguments: object, grid: tuple[int, ...], **keywords: object) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        found.append(Noted(kernel.fn.__name__, grid[0], named))

    with stand_in(hopper, by_driver=False), mock.patch.object(JITFunction, "run", note):
        yield found


# Problems


LAYOUTS = (
    "plain",
    "heads first",
    "part of wider rows",
    "rows of no whole 16 bytes",
    "odd address",
    "one row",
    "one head",
)
"""How operands may lie; the last two stand for all rows, or heads."""

DIMS = [(64, 64), (128, 128), (96, 96), (40, 40), (72, 40), (192, 128), (192, 192), (256, 256), (512, 512)]


@st.composite
def any_tensor(draw: st.DrawFn, rows: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    layout = draw(st.sampled_from([*["plain"] * 4, *LAYOUTS]))
    if layout == "heads first":
        return torch.rand(heads, rows, dim, dtype=dtype).transpose(0, 1)
    if layout == "odd address":
        return torch.rand(rows * heads * dim + 1, dtype=dtype)[1:].view(rows, heads, dim)
    wider = {"part of wider rows": 8, "rows of no whole 16 bytes": 4}.get(layout, 0)
    shape = 1 if layout == "one row" else rows, 1 if layout == "one head" else heads, dim + wider
    return torch.rand(shape, dtype=dtype)[..., :dim].expand(rows, heads, dim)


@dataclass(frozen=True, repr=False)
class Asked:
    """A problem, and what is asked for beside."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    intervals: KeyIntervals
    modifiers: Modifiers | None
    carried: bool
    deterministic: bool
    float_gradients: bool

    def __repr__(self) -> str:
        tensors = [f"{tuple(x.shape)} strides {x.stride()} {x.dtype}" for x in (*self.operands, self.dout)]
        beside = self.carried, self.deterministic, self.float_gradients
        return f"Asked({tensors}, {self.intervals}, {self.modifiers}, {beside})"

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def plain(self) -> bool:
        """Whether the mask is one interval, and scores are as they are."""
        return self.modifiers is None and not self.intervals.has_sink_tokens and self.intervals.blocks is None


def window(rows: int, left: int, band: int | None) -> KeyIntervals:
    row = torch.arange(rows, dtype=torch.int32)
    return KeyIntervals((row - left).clamp(min=0), row + 1, rows, band=band)


@st.composite
def narrow_windows(draw: st.DrawFn) -> KeyIntervals:
    left = draw(st.integers(0, 127))
    return window(draw(st.integers(1, 300)), left, left + 1)


@st.composite
def problems(draw: st.DrawFn, dims: tuple[int, int]) -> Asked:
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    key_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4, 8]))
    intervals, modifiers = draw(any_intervals(300)), None
    kind = draw(st.sampled_from(["plain", "plain", "narrow", "blocks", "modifiers"]))
    if kind == "narrow":
        dtype, intervals = torch.bfloat16, draw(narrow_windows())
    elif kind == "blocks" and not intervals.has_sink_tokens:
        intervals = with_blocks(intervals, *draw(any_blocks(key_heads)))
    elif kind == "modifiers":
        modifiers = draw(any_modifiers(intervals, key_heads * group))
    rows, keys = intervals.query_count, intervals.key_count
    shapes = (rows, key_heads * group, dims[0]), (keys, key_heads, dims[0]), (keys, key_heads, dims[1])
    query, key, value = (draw(any_tensor(*shape, dtype)) for shape in shapes)
    dout = draw(any_tensor(rows, key_heads * group, dims[1], draw(st.sampled_from([dtype, dtype, torch.float32]))))
    return Asked(query, key, value, dout, intervals, modifiers, *(draw(st.booleans()) for _ in range(3)))


def numbers(asked: Asked) -> Tensor:
    return torch.rand(asked.query.shape[1], asked.query.shape[0])


def attend(asked: Asked) -> tuple[list[Noted], Tensor | None]:
    """Launches of a second call of this form, and the result that was carried into it."""
    with launches_noted() as found:
        for _ in range(2):
            found.clear()
            carry = torch.rand(*asked.query.shape[:2], asked.value.shape[2]), numbers(asked)
            out, _ = hopper.attend(
                *asked.operands, asked.intervals, scale=0.3, modifiers=asked.modifiers,
                carry=carry if asked.carried else None, out_dtype=torch.float32 if asked.carried else None,
            )  # fmt: skip
    assert not asked.carried or out is carry[0]
    return found, carry[0] if asked.carried else None


def attend_backward(asked: Asked, finds_delta: bool) -> dict[str, Noted]:
    """Launches of a second call of this form, by kernel; none where delta is to be found and others have to do that."""
    keywords = {"scale": 0.3, "modifiers": asked.modifiers, "deterministic": asked.deterministic}
    keywords["dkey_dtype"] = torch.float32 if asked.float_gradients else None
    with launches_noted() as found:
        for _ in range(2):
            found.clear()
            if finds_delta:
                out, of_rows = torch.rand_like(asked.dout), (numbers(asked), numbers(asked), asked.intervals)
                gradients = hopper.whole_backward(asked.dout, *asked.operands, out, *of_rows, **keywords)
                if gradients is None:
                    assert not asked.plain or asked.query.shape[2] == WIDEST
                    return {}
                *gradients, delta = gradients
                assert delta.shape == (asked.query.shape[1], asked.query.shape[0])
            else:
                of_rows = numbers(asked), numbers(asked), asked.intervals
                carry = torch.rand(asked.query.shape) if asked.carried else None
                gradients = hopper.attend_backward(asked.dout, *asked.operands, *of_rows, carry=carry, **keywords)
    dtype = torch.float32 if asked.float_gradients else asked.key.dtype
    assert [x.dtype for x in gradients] == [asked.query.dtype, dtype, dtype]
    assert [x.shape for x in gradients] == [x.shape for x in asked.operands]
    return {x.kernel: x for x in found}


# What they have in common


def tiles_of(count: int, size: int) -> int:
    return -(-count // size)


def assert_described(found: Noted, name: str, x: Tensor, boxes: bool = False) -> None:
    """The argument describes `x`, or a copy of it only if the tensor memory engine cannot address it."""
    described = found[name]
    base, dtype = described.base, found["query_desc" if "query_desc" in found.arguments else "owned_desc"].base.dtype
    steps = [stride * x.itemsize for stride in x.stride()[:2]]
    reachable = x.data_ptr() % 16 == 0 and steps[0] > 0 and x.stride(2) == 1 and not any(n % 16 for n in steps)
    reachable &= not boxes or steps[1] > 0
    assert (base is x) == (reachable and x.dtype == dtype)
    assert torch.equal(base, x.to(dtype))
    assert base.data_ptr() % 16 == 0
    assert base.stride(2) == 1
    assert all(stride * base.itemsize % 16 == 0 for stride in base.stride()[:2])
    rows, heads, dim = x.shape
    if len(described.shape) == 2:
        assert described.shape == [rows, (heads - 1) * base.stride(1) + dim]
        assert described.strides == [base.stride(0), 1]
        assert described.block_shape[1] <= dim
    else:
        order = [0, 1, 2] if boxes and described.shape[0] == rows and described.block_shape[0] > 1 else [1, 0, 2]
        assert described.shape == [x.shape[i] for i in order]
        assert described.strides == [base.stride(i) for i in order]


def assert_one_place(found: Noted, name: str, shape: torch.Size, dtype: torch.dtype, described: bool) -> None:
    """A result has a descriptor, or in fp32 an address; never both."""
    desc, ptr = found[f"{name}_desc"], found[f"{name}_ptr"]
    assert (desc is None) == (not described)
    assert (ptr is None) == described
    x = desc.base if described else ptr
    assert (x.shape, x.dtype) == (shape, dtype)


# Launches


@pytest.mark.parametrize("dims", DIMS, ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_the_forward_kernel_is_given_the_operands_and_what_they_are(dims: tuple[int, int], data: st.DataObject) -> None:
    asked = data.draw(problems(dims))
    launches, carried = attend(asked)
    (rows, heads, dim), value_dim = asked.query.shape, asked.value.shape[2]
    found = launches[-1]
    if found.kernel == "attend_narrow_kernel":
        tiles = narrow.tiles_for(asked.query, asked.value, asked.intervals, None)
        assert tiles is not None
        assert carried is None
        assert asked.plain
        assert found.programs == tiles_of(rows, tiles.tokens * tiles.passes) * (heads // tiles.pack)
        assert sum(found[name].block_shape[1] for name in ("key_desc", "first_key_desc")) >= asked.intervals.band
        for name, x in (("query", asked.query), ("key", asked.key), ("value", asked.value)):
            assert_described(found, f"{name}_desc", x, boxes=True)
        assert found["heads"] == heads
        assert found["out_desc"].base.shape == asked.query.shape
    elif dim == WIDEST:
        if not asked.plain:  # the portable kernels, which have tests of their own
            return
        assert found.kernel == "attend_widest_kernel"
        assert found.programs == tiles_of(rows, 64) * heads
    else:
        assert found.kernel == "attend_kernel"
        consumers = found["CONSUMERS"]
        assert found.programs == min(tiles_of(rows, 64 * consumers) * heads, PROCESSORS)
        assert found["tiles"] == tiles_of(rows, 64 * consumers)
        assert heads % found["section"] == 0
        assert found["section"] % asked.group == 0
        assert found["HAS_CARRY"] == (carried is not None)
        assert found["HIDES_KEYS"] == (asked.modifiers is not None and asked.modifiers.key_visible is not None)
        assert (found["key_rest_desc"] is not None) == (len(WIDTHS[width_of(dim, value_dim)].keys) == 2)
        assert (found["entries_ptr"] is not None) == (asked.intervals.blocks is not None)
        assert (found["token_pieces_ptr"] is not None) == asked.intervals.has_sink_tokens
        assert (found["seed_ptr"] is not None) == bool(asked.modifiers and asked.modifiers.dropout)
        assert (found["bend"] is not None) == bool(asked.modifiers and asked.modifiers.softcap)
        assert found["counter_ptr"].tolist()[:1] == [0]
    assert found["GROUP"] == asked.group
    assert found["start_ptr"] is asked.intervals.start
    assert found["stop_ptr"] is asked.intervals.stop
    if found.kernel != "attend_narrow_kernel":
        assert found["query_rows"] == rows
        for name, x in (("query", asked.query), ("key", asked.key), ("value", asked.value)):
            assert_described(found, f"{name}_desc", x)
            assert found[f"{name}_head_stride"] == found[f"{name}_desc"].base.stride(1)
        assert found["carry_out_ptr"] is carried


@pytest.mark.parametrize("finds_delta", [False, True])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_the_backward_kernels_are_given_the_operands_and_what_they_are(
    dims: tuple[int, int], finds_delta: bool, data: st.DataObject
) -> None:
    asked = data.draw(problems(dims))
    launches = attend_backward(asked, finds_delta)
    if not launches:
        return
    (rows, heads, dim), (keys, key_heads, value_dim) = asked.query.shape, asked.value.shape
    if asked.deterministic and (asked.intervals.has_sink_tokens or asked.intervals.blocks is not None):
        return  # the portable kernels
    if "dkey_narrow_kernel" in launches:
        of_query, of_key = launches["dquery_narrow_kernel"], launches["dkey_narrow_kernel"]
        assert of_key.programs == tiles_of(keys, narrow.KEY_TILE) * key_heads
        assert of_query["FINDS_DELTA"] == finds_delta
        for found in (of_query, of_key):
            for name in ("query", "dout", "key", "value"):
                assert_described(found, f"{name}_desc", getattr(asked, name), boxes=True)
            assert found["GROUP"] == asked.group
        for name, x in (("dkey", asked.key), ("dvalue", asked.value)):
            dtype = torch.float32 if asked.float_gradients else x.dtype
            assert_one_place(of_key, name, x.shape, dtype, described=not asked.float_gradients)
        return
    if dim == WIDEST:
        if asked.plain:
            assert {"dscores_widest_kernel", "dvalue_widest_kernel"} <= launches.keys()
        return
    found = next(x for name, x in launches.items() if name.startswith("attend_backward"))
    width = {"attend_backward_kernel": dim, "attend_backward_split_kernel": 192, "attend_backward_wide_kernel": 256}
    assert dim <= width[found.kernel]
    for name, place in (("query", "query_desc"), ("dout", "dout_desc"), ("key", "key_desc"), ("value", "value_desc")):
        assert_described(found, place, getattr(asked, name))
        assert found[f"{name}_head_stride"] == found[place].base.stride(1)
    assert ("find_rows_kernel" in launches, "prepare_rows_kernel" in launches) == (finds_delta, not finds_delta)
    M, N = found["query_desc"].block_shape[-2], found["key_desc"].block_shape[-2]
    assert (found["query_rows"], found["key_rows"], found["key_heads"]) == (rows, keys, key_heads)
    assert found["padded_rows"] >= rows + M - 1, "a block may begin at the last row"
    assert (found["GROUP"], found["DIMS"]) == (asked.group, (dim, value_dim))
    assert found["dquery_desc"].base.shape == asked.query.shape
    assert found["dquery_desc"].base.dtype == torch.float32
    assert found["lse_desc"].base.numel() == found["delta_desc"].base.numel() == heads * found["padded_rows"]
    assert found["FLOAT_OUT"] == asked.float_gradients
    for name, x in (("dkey", asked.key), ("dvalue", asked.value)):
        dtype = torch.float32 if asked.float_gradients else x.dtype
        assert_one_place(found, name, x.shape, dtype, described=not asked.float_gradients)
    assert found["rows_of_key_ptr"].shape == (keys, 4)
    assert found["rows_of_tile_ptr"].shape == (tiles_of(keys, N), 4)
    # Each tile of keys of each head has its program, and a tile is the work of one program but for sink tokens'.
    tiles, order = tiles_of(keys, N), found["order_ptr"]
    assert found.programs % key_heads == 0
    if asked.deterministic:
        assert order is None
        assert found.programs == tiles * key_heads
        assert found["turn_of_tile_ptr"].shape == (tiles,)
        assert found["turn_now_ptr"].shape == (heads, tiles_of(rows, M), 2)
        assert key_heads % found["section_ptr"].item() == 0
    else:
        assert sorted(order.tolist()) == list(range(found.programs))
    if found.kernel != "attend_backward_split_kernel":
        work = found["work_ptr"]
        assert (work is not None) == asked.intervals.has_sink_tokens
        assert work is None or len(work) * key_heads == found.programs
        assert (found["entries_ptr"] is not None) == (asked.intervals.blocks is not None)
        assert (found["seed_ptr"] is not None) == bool(asked.modifiers and asked.modifiers.dropout)
    assert (found["bend"] is not None) == bool(asked.modifiers and asked.modifiers.softcap)
    assert (found["query_slopes_desc"] is not None) == bool(asked.modifiers and asked.modifiers.slopes is not None)


@pytest.mark.parametrize("kind", ["plain", "narrow", "modifiers"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (256, 256), (512, 512)], ids=str)
def test_what_is_kept_for_calls_alike_keeps_none_of_their_tensors(dims: tuple[int, int], kind: str) -> None:
    """Or as many queries, keys and values would stay in a GPU's memory as there were forms of calls."""
    shapes = (100, 4, dims[0]), (100, 2, dims[0]), (100, 2, dims[1]), (100, 4, dims[1])
    intervals = window(100, 9, 10 if kind == "narrow" else None)
    modifiers = Modifiers(softcap=3.0) if kind == "modifiers" else None
    with launches_noted() as launches:
        query, key, value, dout = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
        settings = {"scale": 1.0, "modifiers": modifiers}
        out, lse = hopper.attend(query, key, value, intervals, **settings)
        hopper.attend_backward(dout, query, key, value, lse, lse, intervals, **settings)
        hopper.whole_backward(dout, query, key, value, out, lse, None, intervals, **settings)
        assert len(launches) >= 3
        alive = [weakref.ref(x) for x in (query, key, value, dout, out, lse)]
        launches.clear()
        del query, key, value, dout, out, lse
        gc.collect()
        assert [x() for x in alive] == [None] * 6


@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (256, 256), (512, 512)], ids=str)
def test_a_carried_gradient_may_lie_at_any_address(dims: tuple[int, int]) -> None:
    query, key = torch.zeros(100, 4, dims[0]).half(), torch.zeros(100, 2, dims[0]).half()
    value, dout = torch.zeros(100, 2, dims[1]).half(), torch.zeros(100, 4, dims[1]).half()
    lse, carry = torch.zeros(4, 100), torch.rand(query.numel() + 1)[1:].view(query.shape)
    with launches_noted() as launches:
        for _ in range(2):
            arguments = dout, query, key, value, lse, lse, window(100, 9, 10)
            dquery, _, _ = hopper.attend_backward(*arguments, scale=1.0, carry=carry, dquery_dtype=torch.float32)
            assert torch.equal(dquery, carry), "nothing was launched, and so nothing added"
    assert launches


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": torch.zeros(4, 2, 64)}, "query, key, value are"),
        ({"query": torch.zeros(4, 3, 64).half()}, "multiple of Hk"),
        ({"intervals": window(5, 1, None)}, "intervals are for 5 query and 5 key rows; query has 4"),
        ({"intervals": with_blocks(window(4, 1, None), 3, (2, 2), 0)}, "3 groups of heads"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"modifiers": Modifiers(softcap=-1.0)}, r"softcap=-1\.0"),
        ({"query": torch.zeros(4, 2, 320).half(), "key": torch.zeros(4, 2, 320).half()}, "head dimensions 320 and 64"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    x = torch.zeros(4, 2, 64).half()
    asked = {"query": x, "key": x, "value": x, "intervals": window(4, 1, None), "scale": 1.0} | changed
    with launches_noted(), pytest.raises(ArgumentError, match=message):
        hopper.attend(**asked)
