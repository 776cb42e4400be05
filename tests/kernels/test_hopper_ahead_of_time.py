"""The Hopper kernels compile for sm_90 without a GPU and stay within registers, shared memory and instruction order."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from aot import Unlaunched, blocks_on_paper, catch, lists_on_paper
from hopper_aot import Compiled, compile_call

from ringflash.kernels.hopper import backward, backward_programs, backward_rows, forward, widest
from ringflash.kernels.hopper.backward_tiles import BACKWARD_TILES, BackwardTiles, backward_tiles, backward_width
from ringflash.kernels.hopper.widths import WIDEST, WIDTHS, width_of
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.modifiers import Modifiers

SHARED_LIMIT = 232448


QUERIES, KEYS, HEADS, KEY_HEADS = 1000, 1200, 8, 2


def on_paper(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def modifiers_named(names: str) -> Modifiers | None:
    """Modifiers of the named kinds, such as "softcap, slopes"; None for no name."""
    positions = {"query_positions": on_paper(QUERIES, dtype=torch.int32)}
    positions["key_positions"] = on_paper(KEYS, dtype=torch.int32)
    kinds = {
        "softcap": {"softcap": 50.0},
        "slopes": {"slopes": on_paper(QUERIES, HEADS), **positions},
        "dropout": {"dropout": 0.1, "seed": on_paper(1, dtype=torch.int64), **positions},
        "padding": {"key_visible": on_paper(KEYS, dtype=torch.uint8)},
    }
    found = {name: x for kind in filter(None, names.split(", ")) for name, x in kinds[kind].items()}
    return Modifiers(**found) if found else None


def masked(sink_tokens: bool, block: int | None = None) -> KeyIntervals:
    """A causal mask, with room for sink tokens if asked, or with a layout of blocks of some size."""
    intervals = causal_intervals(QUERIES, KEYS, "meta")
    if block is not None:
        return intervals.with_blocks(blocks_on_paper(QUERIES, KEYS, block))
    if not sink_tokens:
        return intervals
    tokens = (on_paper(QUERIES, dtype=torch.int32) for _ in range(2))
    return KeyIntervals(intervals.start, intervals.stop, KEYS, *tokens)


def compile_forward(
    dims: tuple[int, int],
    tiles: forward.ForwardTiles,
    dtype: torch.dtype,
    carry: bool,
    out_dtype: torch.dtype,
    modifiers: Modifiers | None = None,
    sinks: bool = False,
    sink_tokens: bool = False,
    block: int | None = None,
) -> Compiled:
    query, key = on_paper(QUERIES, HEADS, dims[0], dtype=dtype), on_paper(KEYS, KEY_HEADS, dims[0], dtype=dtype)
    value = on_paper(KEYS, KEY_HEADS, dims[1], dtype=dtype)
    state = (on_paper(QUERIES, HEADS, dims[1]), on_paper(HEADS, QUERIES)) if carry else None
    logits = on_paper(HEADS, dtype=dtype) if sinks else None

    def numbers(modifiers: Modifiers) -> torch.Tensor | None:
        return None if modifiers.slopes is None and modifiers.key_visible is None else on_paper(KEYS)

    def launch():
        operands = (query, key, value, masked(sink_tokens, block))
        prepared = forward.PreparedForward(*operands, 0.1, state, out_dtype, tiles, modifiers, logits)
        prepared(*operands, state, modifiers, logits)

    with (
        lists_on_paper(),
        mock.patch.object(forward, "multiprocessors", return_value=132),
        mock.patch.object(forward, "key_numbers", numbers),
    ):
        return compile_call(catch(forward, "attend_kernel", launch))


def compile_backward(
    dims: tuple[int, int],
    tiles: BackwardTiles,
    dtype: torch.dtype,
    dkey_dtype: torch.dtype,
    deterministic: bool,
    modifiers: Modifiers | None = None,
    width: str | None = None,
    sink_tokens: bool = False,
    block: int | None = None,
    even: bool = False,
) -> Compiled:
    """Compile a launch with the kernel in use, or that of the width given."""
    query, key = on_paper(QUERIES, HEADS, dims[0], dtype=dtype), on_paper(KEYS, KEY_HEADS, dims[0], dtype=dtype)
    dout, value = on_paper(QUERIES, HEADS, dims[1], dtype=dtype), on_paper(KEYS, KEY_HEADS, dims[1], dtype=dtype)
    numbers = on_paper(HEADS, QUERIES)

    def launch():
        operands, sums = (dout, query, key, value), (numbers, numbers, None)
        intervals = replace(masked(sink_tokens, block), even=even)
        prepared = backward.PreparedBackward(
            operands, sums, None, intervals, 0.1, dkey_dtype, tiles, deterministic, modifiers
        )
        prepared(operands, sums, None, intervals, dtype, modifiers)

    kernels = {"256": "attend_backward_wide_kernel", "192/128": "attend_backward_split_kernel"}
    width = width or backward_width(*dims, not (deterministic or modifiers or sink_tokens or block))
    name = kernels.get(width, "attend_backward_kernel")
    with (
        lists_on_paper(),
        mock.patch.object(backward, "backward_width", return_value=width),
        mock.patch.object(backward_programs, "multiprocessors", return_value=132),
        mock.patch.multiple(backward_rows, prepare_rows_kernel=Unlaunched(), prepare_slopes_kernel=Unlaunched()),
        mock.patch.object(backward, "add_slots"),
    ):
        return compile_call(catch(backward, name, launch))


def softmax_before_wait(blocks: dict[str, list[str]]) -> int:
    """Loops whose softmax, perhaps in branches that meet, is left before the block that waits for all products."""
    found = 0
    for here, following in itertools.pairwise(blocks):
        meeting = [here, *(name for name, block in blocks.items() if f"BRA {here}" in block)]
        softmax = any(blocks[name].count("MUFU.EX2") >= 16 for name in meeting)
        softmax = softmax and not any("DEPBAR 0x0" in x for x in blocks[here])
        found += softmax and bool(blocks[following]) and blocks[following][0] == "WARPGROUP.DEPBAR 0x0"
    return found


def dims_of(width: str) -> tuple[int, int]:
    """Head dimensions that fill a width's blocks."""
    return tuple(map(sum, vars(WIDTHS[width]).values()))


# Shapes that docs/benchmarks/hopper.py compares with those in use; they must go on compiling as well.
FORWARD_SHAPES = [
    *forward.FORWARD_TILES.items(),
    ("64", replace(forward.FORWARD_TILES["64"], consumers=2, registers=(240, 24))),
]


def assert_forward_fits(compiled: Compiled, tiles: forward.ForwardTiles, spilled: int = 64, loops: int = 1) -> None:
    assert compiled.warnings == []
    assert compiled.spilled <= spilled
    assert compiled.shared < SHARED_LIMIT
    assert softmax_before_wait(compiled.blocks) == loops * tiles.consumers, f"{loops} loops in each warpgroup"


# Bytes a thread may spill: next to none, once a tile.
@pytest.mark.parametrize(("width", "tiles"), FORWARD_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("carry", "out_dtype"),
    [(False, torch.bfloat16), (False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=["plain", "first carry", "carry", "last carry"],
)
def test_forward_fits_and_keeps_the_softmax_before_the_wait(width, tiles, carry, out_dtype):
    assert_forward_fits(compile_forward(dims_of(width), tiles, torch.bfloat16, carry, out_dtype), tiles)


@pytest.mark.parametrize("dims", [(96, 96), (72, 40), (176, 128)], ids=str)
@pytest.mark.parametrize("carry", [False, True], ids=["plain", "last carry"])
def test_forward_fits_with_blocks_wider_than_heads(dims, carry):
    tiles = forward.FORWARD_TILES[width_of(*dims)]
    assert_forward_fits(compile_forward(dims, tiles, torch.bfloat16, carry, torch.bfloat16), tiles)


# At 256, whose accumulators leave no registers for a block's positions, some are read again in each step; one is with
# a softcap. The rest is spilled once a tile.
@pytest.mark.parametrize(("width", "tiles"), forward.MODIFIED_FORWARD_TILES.items(), ids=str)
@pytest.mark.parametrize("names", ["softcap", "slopes", "padding", "slopes, padding"])
def test_forward_fits_with_modifiers(width, tiles, names):
    compiled = compile_forward(
        dims_of(width), tiles, torch.bfloat16, True, torch.bfloat16, modifiers_named(names), sinks=True
    )
    assert_forward_fits(compiled, tiles, spilled=184 if width == "256" or names == "softcap" else 64)


# What spills is read once in a step of more than 2,000 instructions.
@pytest.mark.parametrize(("width", "tiles"), forward.MODIFIED_FORWARD_TILES.items(), ids=str)
def test_forward_fits_with_dropout(width, tiles):
    modifiers = modifiers_named("dropout")
    compiled = compile_forward(dims_of(width), tiles, torch.bfloat16, True, torch.bfloat16, modifiers)
    assert compiled.warnings == []
    assert compiled.spilled <= (336 if width == "256" else 256)
    assert compiled.shared < SHARED_LIMIT


@pytest.mark.parametrize(("width", "tiles"), forward.FORWARD_TILES.items(), ids=str)
def test_forward_fits_with_sink_tokens(width, tiles):
    compiled = compile_forward(dims_of(width), tiles, torch.bfloat16, True, torch.bfloat16, sink_tokens=True)
    # Three warpgroups of width 64 have 160 registers a thread; triton 3.6 spills 76 bytes, 3.7.1 60.
    assert_forward_fits(compiled, tiles, spilled=80 if width == "64" else 64, loops=2)


@pytest.mark.parametrize(("width", "block"), [("128", 128), *((x, 32) for x in forward.MODIFIED_FORWARD_TILES)])
def test_forward_fits_with_lists_of_blocks(width, block):
    tiles = forward.MODIFIED_FORWARD_TILES[width]
    compiled = compile_forward(dims_of(width), tiles, torch.bfloat16, True, torch.bfloat16, block=block)
    assert_forward_fits(compiled, tiles)


# Two accumulators for keys and values fill most of the registers; what spills is read once a step or less.
SPILLED = {"64": 64, "128": 80, "192/128": 96, "256": 192}


@pytest.mark.parametrize(("width", "tiles"), BACKWARD_TILES.items(), ids=str)
@pytest.mark.parametrize(
    ("dkey_dtype", "deterministic"),
    [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)],
    ids=["plain", "float32", "deterministic"],
)
def test_backward_fits(width, tiles, dkey_dtype, deterministic):
    if deterministic and width == "192/128":
        pytest.skip("repeats bit for bit in blocks of 256 columns")
    compiled = compile_backward(dims_of(width), tiles, torch.bfloat16, dkey_dtype, deterministic, width=width)
    assert compiled.warnings == []
    assert compiled.spilled <= SPILLED[width]
    assert compiled.shared < SHARED_LIMIT


@pytest.mark.parametrize("width", ["64", "128"])
def test_backward_fits_that_repeats_head_by_head(width):
    tiles = BACKWARD_TILES[width]
    by_head, by_block = (
        compile_backward(dims_of(width), tiles, torch.bfloat16, torch.bfloat16, True, even=even)
        for even in (True, False)
    )
    assert by_head.warnings == []
    assert by_head.spilled <= SPILLED[width]
    assert by_head.shared == by_block.shared
    assert by_head.binary != by_block.binary


@pytest.mark.parametrize(
    ("dims", "deterministic"), [((96, 96), False), ((72, 40), True), ((192, 192), False), ((192, 128), True)], ids=str
)
def test_backward_fits_with_blocks_wider_than_heads(dims, deterministic):
    width = backward_width(*dims, not deterministic)
    compiled = compile_backward(dims, BACKWARD_TILES[width], torch.bfloat16, torch.bfloat16, deterministic)
    assert compiled.warnings == []
    assert compiled.spilled <= SPILLED[width]
    assert compiled.shared < SHARED_LIMIT


@pytest.mark.parametrize("width", ["64", "128", "256"])
@pytest.mark.parametrize(("names", "more"), [("softcap", 80), ("slopes", 80), ("softcap, slopes", 320)])
def test_backward_fits_with_modifiers(width, names, more):
    modifiers = modifiers_named(names)
    tiles = backward_tiles(modifiers)[width]
    compiled = compile_backward(dims_of(width), tiles, torch.bfloat16, torch.bfloat16, False, modifiers)
    assert compiled.warnings == []
    assert compiled.spilled <= SPILLED[width] + more
    assert compiled.shared < SHARED_LIMIT


# As in the forward pass, but for twice as many bytes at 64, whose blocks have twice as many pairs.
@pytest.mark.parametrize(
    ("width", "names", "deterministic", "spilled"),
    [
        ("64", "dropout", False, 704),
        ("128", "dropout", True, 320),
        ("256", "dropout", False, 416),
        ("128", "slopes, dropout", False, 592),
    ],
)
def test_backward_fits_with_dropout(width, names, deterministic, spilled):
    modifiers = modifiers_named(names)
    tiles = backward_tiles(modifiers)[width]
    compiled = compile_backward(dims_of(width), tiles, torch.bfloat16, torch.bfloat16, deterministic, modifiers)
    assert compiled.warnings == []
    assert compiled.spilled <= spilled
    assert compiled.shared < SHARED_LIMIT


# Rows that see a key as a sink token are read where a block needs a mask, and take registers then.
@pytest.mark.parametrize(
    ("width", "names", "more"), [("64", "", 80), ("128", "", 80), ("128", "softcap", 120), ("256", "", 80)]
)
def test_backward_fits_with_sink_tokens(width, names, more):
    tiles, modifiers = BACKWARD_TILES[width], modifiers_named(names)
    compiled = compile_backward(
        dims_of(width), tiles, torch.bfloat16, torch.bfloat16, False, modifiers, sink_tokens=True
    )
    assert compiled.warnings == []
    assert compiled.spilled <= SPILLED[width] + more
    assert compiled.shared < SHARED_LIMIT


# Which pairs are to be hidden is read where a block has some, and takes registers then.
@pytest.mark.parametrize(
    ("width", "block", "more"), [("128", 128, 32), ("64", 32, 140), ("128", 32, 140), ("256", 32, 140)]
)
def test_backward_fits_with_lists_of_blocks(width, block, more):
    tiles = BACKWARD_TILES[width]
    compiled = compile_backward(dims_of(width), tiles, torch.bfloat16, torch.bfloat16, False, block=block)
    assert compiled.warnings == []
    assert compiled.spilled <= SPILLED[width] + more
    assert compiled.shared < SHARED_LIMIT


def compile_widest(gradient: str | None, dtype: torch.dtype, carry: bool, out_dtype: torch.dtype) -> Compiled:
    """Compile the launch at head dimension 512 for the result, or for a gradient."""
    query, dout = (on_paper(QUERIES, HEADS, WIDEST, dtype=dtype) for _ in range(2))
    key, value = (on_paper(KEYS, KEY_HEADS, WIDEST, dtype=dtype) for _ in range(2))
    carried, numbers, intervals = on_paper(QUERIES, HEADS, WIDEST), on_paper(HEADS, QUERIES), masked(False)
    if gradient is None:
        operands, state = (query, key, value, intervals), (carried, numbers) if carry else None
        prepared = widest.PreparedForward(*operands, 0.1, state, out_dtype, widest.FORWARD_TILES)
        return compile_call(catch(widest, "attend_widest_kernel", lambda: prepared(*operands, state)))
    operands, sums = (dout, query, key, value), (numbers, numbers, carried if carry else None)
    prepared = widest.PreparedBackward(operands, sums, intervals, 0.1, out_dtype, out_dtype)
    for other in {"dquery", "dkey", "dvalue"} - {gradient}:
        setattr(prepared, f"launch_{other}", lambda *arguments: None)
    kernel = "dvalue_widest_kernel" if gradient == "dvalue" else "dscores_widest_kernel"
    return compile_call(catch(widest, kernel, lambda: prepared(operands, sums, intervals)))


@pytest.mark.parametrize("gradient", [None, "dquery", "dkey", "dvalue"])
@pytest.mark.parametrize(
    ("dtype", "carry", "out_dtype"),
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float16),
    ],
    ids=["plain", "carry", "last carry"],
)
def test_launches_at_head_dimension_512_fit(gradient, dtype, carry, out_dtype):
    compiled = compile_widest(gradient, dtype, carry, out_dtype)
    assert compiled.warnings == []
    assert compiled.spilled == 0
    assert compiled.shared < SHARED_LIMIT


def test_what_plain_attention_does_not_need_is_not_in_its_machine_code():
    """No softcap's hyperbolic tangent, no numbers of keys: a plain forward kernel has as much shared memory without."""
    tiles = forward.FORWARD_TILES["128"]
    plain, padded = (
        compile_forward((128, 128), tiles, torch.bfloat16, False, torch.bfloat16, modifiers_named(names))
        for names in ("", "padding")
    )
    assert padded.shared - plain.shared >= 2 * tiles.keys * 4
    loops = [sum(map(len, x.blocks.values())) for x in (plain, padded)]
    assert loops[0] < loops[1]
