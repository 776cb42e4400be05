"""Every Triton kernel compiles for chips that are not there, within their registers and shared memory."""

from __future__ import annotations

import pytest
import torch
from aot import SHARED_LIMIT, Resources, blocks_on_paper, catch, compile_for, lists_on_paper

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu import chips, row_delta
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton.attend import backward, forward, tile_sizes
from ringflash.kernels.triton.attend.modify_scores import modifier_operands

CHIPS = {"sm_80": "ampere", "sm_89": "consumer", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
"""The row of the table of tiles that a target takes."""

SPILLED = 128
"""Bytes of a thread's registers that a kernel may keep in memory."""

SPILLED_BY_MODIFIERS = 384
"""The same with every modifier at once, of which dropout takes most; with one of them a few blocks spill at all."""

SPILLED_BY_MODIFIERS_KNOWINGLY = {("sm_100", "dkey"): 392}
"""By ptxas with the options that Triton launches kernels with, which it is assembled with here."""

SPILLED_KNOWINGLY = {
    # Two stages and spills measured a sixth faster on an H100 than one stage without (docs/benchmarks/tiles.json).
    ("sm_90", "dkey", 256, torch.bfloat16): 1024,
    # float32 is exact on the plain units, whose operands all lie in registers.
    ("sm_90", "dkey", 128, torch.float32): 1024,
    ("sm_90", "dquery", 128, torch.float32): 1024,
}


def launch(
    kernel: str, chip: str, dim: int, dtype: torch.dtype, sink: bool, carried: bool, modifiers: Modifiers | None = None,
    block: int | None = None,
):  # fmt: skip
    """The call that launches a kernel for 16 query and 4 key heads; the tensors are never read."""
    rows = 4096
    query, dout, out = (torch.empty(rows, 16, dim, dtype=dtype) for _ in range(3))
    key, value = (torch.empty(rows, 4, dim, dtype=dtype) for _ in range(2))
    bounds = torch.arange(rows, dtype=torch.int32)
    intervals = KeyIntervals(bounds, bounds + 1, rows, *((bounds, bounds) if sink else ()))
    if block is not None:
        intervals = intervals.with_blocks(blocks_on_paper(rows, rows, block, "cpu"))
    lse = torch.empty(16, rows)
    modified = modifier_operands(modifiers, 1.0)
    row = (chip, dtype, dim, modified.seed is not None)
    if kernel == "attend":
        carry = (out.float(), lse) if carried else None
        operands = (query, key, value)
        prepared = forward.PreparedForward(operands, intervals, 1.0, tile_sizes.forward_tiles(*row), True, carried)
        return catch(forward, "attend_kernel", lambda: prepared(operands, intervals, modified, carry, dtype))
    operands = (query, key, value, dout)
    if kernel in ("dkey", "dvalue"):
        value_tiles = tile_sizes.value_gradient_tiles(*row[:3])
        sums, tiles = ("both" if value_tiles is None else "key"), tile_sizes.key_gradient_tiles(*row)
        if kernel == "dvalue":
            sums, tiles = "value", value_tiles
        prepared = backward.PreparedKeyGradient(operands, intervals, 1.0, tiles, True, sums)
        pairs = torch.empty(16, rows, 2)
        return catch(backward, "dkey_kernel", lambda: prepared(operands, pairs, intervals, modified, dtype))
    carry = out.float() if carried else None
    prepared = backward.PreparedQueryGradient(
        operands, intervals, 1.0, tile_sizes.query_gradient_tiles(*row), True, carried
    )
    return catch(backward, "dquery_kernel", lambda: prepared(operands, lse, lse, intervals, modified, carry, dtype))


def check(resources: Resources, target: str, kernel: str, dim: int, dtype: torch.dtype) -> None:
    assert resources.spilled <= SPILLED_KNOWINGLY.get((target, kernel, dim, dtype), SPILLED)
    assert resources.shared <= SHARED_LIMIT[target]
    assert not resources.warnings


@pytest.mark.parametrize("kernel", ["attend", "dkey", "dquery"])
@pytest.mark.parametrize(
    ("target", "dim"), [(t, dim) for t in CHIPS for dim in (64, 128, 256) if (t, dim) != ("sm_89", 64)]
)
def test_kernels_compile_for_every_chip_without_spills(target: str, dim: int, kernel: str) -> None:
    call = launch(kernel, CHIPS[target], dim, torch.bfloat16, sink=False, carried=False)
    check(compile_for(target, call), target, kernel, dim, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["attend", "dkey", "dquery"])
def test_kernels_with_sink_and_carry_fit_hopper(kernel: str) -> None:
    call = launch(kernel, "hopper", 128, torch.bfloat16, sink=True, carried=True)
    check(compile_for("sm_90", call), "sm_90", kernel, 128, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["attend", "dkey", "dquery"])
@pytest.mark.parametrize("target", CHIPS)
def test_kernels_with_lists_of_blocks_compile_for_every_chip(target: str, kernel: str) -> None:
    """Of blocks of which some pairs have to be hidden."""
    with lists_on_paper():
        resources = compile_for(target, launch(kernel, CHIPS[target], 128, torch.bfloat16, False, False, block=32))
    assert resources.spilled <= SPILLED
    assert resources.shared <= SHARED_LIMIT[target]
    assert not resources.warnings


@pytest.mark.parametrize("kernel", ["attend", "dkey", "dquery"])
@pytest.mark.parametrize("target", CHIPS)
def test_kernels_with_every_modifier_compile_for_every_chip(target: str, kernel: str) -> None:
    position = torch.empty(4096, dtype=torch.int32)
    modifiers = Modifiers(
        softcap=30.0,
        slopes=torch.empty(4096, 16),
        dropout=0.1,
        seed=torch.empty(1, dtype=torch.int64),
        query_positions=position,
        key_positions=position,
        key_visible=position.to(torch.uint8),
        first_head=3,
    )
    resources = compile_for(target, launch(kernel, CHIPS[target], 128, torch.bfloat16, False, False, modifiers))
    assert resources.spilled <= SPILLED_BY_MODIFIERS_KNOWINGLY.get((target, kernel), SPILLED_BY_MODIFIERS)
    assert resources.shared <= SHARED_LIMIT[target]
    assert not resources.warnings


@pytest.mark.parametrize(
    ("target", "kernel"),
    [("sm_80", "attend"), ("sm_80", "dkey"), ("sm_80", "dquery")]
    + [("sm_90", kernel) for kernel in ("attend", "dkey", "dvalue", "dquery")],
)
def test_kernels_for_head_dimension_512_fit(target: str, kernel: str) -> None:
    call = launch(kernel, CHIPS[target], 512, torch.bfloat16, sink=False, carried=False)
    resources = compile_for(target, call)
    check(resources, target, kernel, 512, torch.bfloat16)
    # Blocks of fewer than 64 rows would leave it to the slow products.
    assert ("wgmma.mma_async" in resources.assembly) == (target == "sm_90")


def test_head_dimensions_that_fit_no_blocks_are_not_offered() -> None:
    assert tile_sizes.widest("hopper", torch.float32) == 512
    assert tile_sizes.widest("consumer", torch.bfloat16) == 512
    assert tile_sizes.widest("consumer", torch.float32) == 256
    assert tile_sizes.widest("cdna", torch.float32) == 256


@pytest.mark.parametrize("kernel", ["attend", "dkey", "dquery"])
def test_exact_float32_kernels_fit_hopper(kernel: str) -> None:
    call = launch(kernel, "hopper", 128, torch.float32, sink=False, carried=False)
    check(compile_for("sm_90", call), "sm_90", kernel, 128, torch.float32)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_row_delta_compiles(target: str) -> None:
    dout = torch.empty(64, 4, 128, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_delta, "chip_of", lambda device: CHIPS[target])
        call = catch(row_delta, "delta_kernel", lambda: row_delta.row_delta(dout, dout, torch.empty(4, 64)))
    resources = compile_for(target, call)
    assert resources.spilled == 0


def test_hopper_reads_by_the_tensor_memory_engine_and_multiplies_asynchronously() -> None:
    call = launch("attend", "hopper", 128, torch.bfloat16, sink=False, carried=False)
    assembly = compile_for("sm_90", call).assembly
    assert "cp.async.bulk.tensor" in assembly
    assert "wgmma.mma_async" in assembly


@pytest.mark.parametrize(
    ("capability", "chip"),
    [
        ((8, 0), "ampere"),
        ((8, 6), "consumer"),
        ((8, 9), "consumer"),
        ((9, 0), "hopper"),
        ((10, 3), "blackwell"),
        ((12, 0), "consumer"),
    ],
)
def test_chips_are_known_by_their_capability(capability: tuple[int, int], chip: str) -> None:
    assert chips.chip_of_capability(capability) == chip


def test_chips_before_ampere_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"7\.5"):
        chips.chip_of_capability((7, 5))
