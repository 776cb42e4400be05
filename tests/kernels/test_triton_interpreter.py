"""The Triton kernels against float64 without a GPU, in Triton's interpreter.

The interpreter is chosen when triton is first imported, so the tests below run in a pytest of their own, which the one
test of the ordinary run starts. bfloat16 products are wrong in the interpreter; GPU tests cover them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import assert_passes_in_interpreter
from oracle import (
    LAYOUTS,
    Problem,
    any_blocks,
    any_intervals,
    any_modifiers,
    assert_accurate,
    assert_nan_stays,
    assert_same,
    dense_intervals,
    draw_modifiers,
    draw_problem,
    run,
    with_blocks,
)

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.add_rows import add_rows
from ringflash.kernels.gpu.block_lists import WORD, BlockLists, key_lists, query_lists
from ringflash.kernels.gpu.lay_rows import lay_rows
from ringflash.kernels.gpu.round_numbers import round_numbers
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.kept import Kept
from ringflash.kernels.modifiers import Modifiers, keep_mask
from ringflash.kernels.sums import Part
from ringflash.kernels.sums import add_rows as add_rows_by_torch
from ringflash.kernels.triton import attend as kernels
from ringflash.kernels.triton.attend import backward, forward
from ringflash.kernels.triton.attend.tile_sizes import Tiles
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import key_intervals

if not triton.knobs.runtime.interpret:

    def test_triton_kernels_pass_their_tests_in_the_interpreter() -> None:
        assert_passes_in_interpreter(__file__)

else:
    # Blocks of unequal sides, so that many fit into small problems and a mistaken side shows; and those of the kernel
    # for the gradient of value alone, if there is one.
    TILES = {
        "three-loops": (Tiles(32, 16, 4, 1), None),
        "one-loop, values apart": (Tiles(16, 32, 4, 1, split=False), Tiles(32, 16, 4, 1, split=False)),
        "descriptors": (Tiles(32, 16, 4, 1, descriptors=True), None),
    }

    @pytest.fixture(params=TILES.values(), ids=TILES, scope="module")
    def tiles(request: pytest.FixtureRequest):
        tiles, of_values = request.param
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward, "forward_tiles", lambda *row: tiles)
            patch.setattr(backward, "key_gradient_tiles", lambda *row: tiles)
            patch.setattr(backward, "value_gradient_tiles", lambda *row: of_values)
            patch.setattr(backward, "query_gradient_tiles", lambda *row: tiles)
            patch.setattr(forward, "prepared_calls", Kept())
            patch.setattr(backward, "prepared_calls", Kept())
            yield tiles

    @st.composite
    def problems(draw: st.DrawFn, dtype: torch.dtype) -> Problem:
        key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
        dim, value_dim = draw(st.sampled_from([(16, 16), (24, 24), (40, 16), (16, 72)]))
        heads, layout = (key_heads * group, key_heads), draw(st.sampled_from(LAYOUTS))
        intervals, seed = draw(any_intervals(70)), draw(st.integers(0, 2**32 - 1))
        return draw_problem(intervals, heads, (dim, value_dim), dtype, seed=seed, layout=layout)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    @settings(max_examples=8)
    @given(data=st.data())
    def test_as_accurate_as_torch_in_one_launch_and_in_several(
        tiles: Tiles, dtype: torch.dtype, data: st.DataObject
    ) -> None:
        problem = data.draw(problems(dtype))
        cuts = data.draw(st.lists(st.integers(0, problem.intervals.key_count), max_size=2))
        assert_accurate(run(kernels, problem, cuts, backwards=data.draw(st.booleans())), problem)

    @pytest.mark.parametrize("cuts", [[], [40]], ids=["one-launch", "two-launches"])
    def test_shared_prompts_and_spans_are_as_accurate_as_torch(tiles: Tiles, cuts: list[int]) -> None:
        mask = Mask.shared_prefix([34, 3], [[5, 0, 9], [1, 8]], spans=[(2, 9), (30, 50), (51, 54)])
        positions = torch.arange(60)
        intervals = key_intervals(mask, torch.tensor(mask.boundaries), positions, positions)
        problem = draw_problem(intervals, (2, 1), (24, 16), torch.float32)
        assert_accurate(run(kernels, problem, cuts), problem)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    @settings(max_examples=5)
    @given(data=st.data())
    def test_modified_scores_are_as_accurate_as_torch(tiles: Tiles, dtype: torch.dtype, data: st.DataObject) -> None:
        problem = data.draw(problems(dtype))
        modifiers = data.draw(any_modifiers(problem.intervals, problem.query.shape[1]))
        problem = replace(problem, modifiers=modifiers)
        problem = replace(problem, dlse=problem.dlse * problem.visible().any(1))
        cuts = data.draw(st.lists(st.integers(0, problem.intervals.key_count), max_size=1))
        assert_accurate(run(kernels, problem, cuts), problem)

    @settings(max_examples=5)
    @given(data=st.data())
    def test_listed_blocks_are_as_accurate_as_torch(tiles: Tiles, data: st.DataObject) -> None:
        """Blocks that are whole ones of the kernels', and others that begin and end within them."""
        intervals = data.draw(any_intervals(70, sink=False))
        intervals = with_blocks(intervals, *data.draw(any_blocks(key_heads=2)))
        cuts = data.draw(st.lists(st.integers(0, intervals.key_count), max_size=1))
        problem = draw_problem(intervals, (4, 2), (16, 24), torch.float32)
        assert_accurate(run(kernels, problem, cuts), problem)

    def test_listed_blocks_take_modifiers(tiles: Tiles) -> None:
        intervals = with_blocks(causal_intervals(90, 100), 2, (32, 16), seed=1)
        drawn = draw_modifiers(intervals, 4, 3, softcap=3.0, slopes="of each row", dropout=0.3, padding=True)
        problem = draw_problem(intervals, (4, 2), (16, 16), torch.float32, modifiers=drawn)
        assert_accurate(run(kernels, problem), problem)

    @settings(max_examples=10)
    @given(data=st.data())
    def test_lists_have_each_block_with_a_visible_pair_once_and_bits_say_which_pairs(data: st.DataObject) -> None:
        intervals = data.draw(any_intervals(200, sink=False))
        intervals = with_blocks(intervals, *data.draw(any_blocks(key_heads=2)))
        rows, keys = (data.draw(st.sampled_from([16, 32, 64])) for _ in range(2))
        visible, shown = intervals.visible(), intervals.blocks.visible()
        assert_listed(key_lists(intervals, rows, keys), visible, shown, rows, keys)
        swapped = (x.transpose(1, 2) for x in (visible, shown))
        assert_listed(query_lists(intervals, keys, rows), *swapped, keys, rows)

    def assert_listed(lists: BlockLists, visible: torch.Tensor, shown: torch.Tensor, tile: int, block: int) -> None:
        columns = visible.shape[2]
        for group, index in itertools.product(range(len(visible)), range(lists.entries.shape[1])):
            count, *entries = lists.entries[group, index].tolist()
            firsts, rows = [entry & -2 for entry in entries[:count]], slice(index * tile, (index + 1) * tile)
            assert count
            assert firsts == sorted(set(firsts))
            walked = torch.zeros(columns, dtype=torch.bool)
            for first, entry in zip(firsts, entries, strict=False):
                assert first % block == 0
                here = shown[group, rows, first : first + block]
                walked[first : first + block] = True
                assert bool(entry & 1) == (not here.all())
                assert here.any() or (count == 1 and first >= columns)
            assert not (visible[group, rows] & ~walked).any()
        if lists.bits is None:
            return
        bits = (lists.bits[..., None] >> torch.arange(WORD) & 1).flatten(2)[..., :columns]
        assert torch.equal(bits[:, lists.row_block.long()] != 0, shown)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    def test_nan_reaches_out_and_lse_through_later_launches(tiles: Tiles, dtype: torch.dtype) -> None:
        assert_nan_stays(kernels, dtype, "cpu")

    @pytest.mark.parametrize("shown", [slice(40, 53), slice(0, 1), slice(0, 0)], ids=["last", "first", "none"])
    def test_blocks_whose_keys_are_all_padding(tiles: Tiles, shown: slice) -> None:
        visible = torch.zeros(53, dtype=torch.uint8)
        visible[shown] = 1
        intervals, modifiers = dense_intervals(37, 53), Modifiers(key_visible=visible)
        problem = draw_problem(intervals, (2, 1), (16, 16), torch.float32, modifiers=modifiers)
        results = run(kernels, problem)
        assert_accurate(results, problem)
        assert results.lse.isneginf().all() == (not visible.any())

    @pytest.mark.parametrize(("dropout", "first_head"), [(0.1, 0), (0.5, 0), (0.9, 0), (0.5, 1), (0.5, 32)])
    def test_dropout_drops_the_pairs_of_its_definition(tiles: Tiles, dropout: float, first_head: int) -> None:
        """Keys and values are unit vectors, so each number of the results shows the fate of one pair."""
        queries, keys, heads = 40, 50, 3
        modifiers = Modifiers(
            dropout=dropout,
            seed=torch.tensor([-(2**62) - 987654321]),
            query_positions=torch.arange(queries, dtype=torch.int32) + 2**31 - queries,
            key_positions=torch.arange(keys, dtype=torch.int32) * 41943041,
            first_head=first_head,
        )
        unit = torch.eye(64)[:, None].expand(64, heads, 64)
        query, key = torch.zeros(queries, heads, 64), unit[:keys].contiguous()
        launch = {"intervals": dense_intervals(queries, keys), "scale": 1.0, "modifiers": modifiers}
        out, lse = kernels.attend(query, key, key, **launch)
        delta = torch.zeros_like(lse)
        dquery, _, _ = kernels.attend_backward(torch.ones_like(query), query, key, key, lse, delta, **launch)
        rows_apart = unit[:queries].contiguous()
        _, _, dvalue = kernels.attend_backward(rows_apart, query, key, key, lse, delta, **launch)
        right = keep_mask(replace(modifiers, first_head=0), first_head + heads)[first_head:]
        assert torch.equal(out[..., :keys].transpose(0, 1) != 0, right)
        assert torch.equal(dquery[..., :keys].transpose(0, 1) != 0, right)
        assert torch.equal(dvalue[..., :queries].permute(1, 2, 0) != 0, right)

    @pytest.mark.parametrize("dim", [8, 104, 512])
    def test_the_least_an_odd_and_the_widest_head_dimension(tiles: Tiles, dim: int) -> None:
        problem = draw_problem(causal_intervals(37, 53), (2, 1), (dim, dim), torch.float32)
        assert_accurate(run(kernels, problem), problem)

    @pytest.mark.parametrize("queries", [0, 1, 5])
    @pytest.mark.parametrize("keys", [0, 1, 7])
    def test_few_or_no_rows_and_keys(tiles: Tiles, queries: int, keys: int) -> None:
        problem = draw_problem(dense_intervals(queries, keys), (2, 1), (16, 24), torch.float32)
        assert_accurate(run(kernels, problem), problem)

    def test_carry_is_overwritten_and_rows_without_keys_keep_it(tiles: Tiles) -> None:
        problem = draw_problem(dense_intervals(40, 50), (2, 2), (16, 16), torch.float32)
        out, lse = kernels.attend(problem.query, problem.key, problem.value, problem.intervals, scale=1.0)
        carry = (out.clone(), lse.clone())
        nothing = KeyIntervals(*torch.tensor([[9] * 40, [9] * 40], dtype=torch.int32), key_count=50)
        merged = kernels.attend(problem.query, problem.key, problem.value, nothing, scale=1.0, carry=carry)
        assert [x.data_ptr() for x in merged] == [x.data_ptr() for x in carry]
        assert torch.equal(merged[0], out)
        torch.testing.assert_close(merged[1], lse, rtol=1e-6, atol=0)  # once through base 2 and back

    def test_gradients_repeat_bit_for_bit(tiles: Tiles) -> None:
        problem = draw_problem(causal_intervals(60, 60), (4, 2), (16, 16), torch.float16)
        assert_same(run(kernels, problem, deterministic=True), run(kernels, problem, deterministic=True))

    def attend_with(**changed: object) -> None:
        problem = draw_problem(causal_intervals(4, 4), (2, 2), (16, 16), torch.float32)
        arguments = {"query": problem.query, "key": problem.key, "value": problem.value, "scale": 1.0, **changed}
        kernels.attend(intervals=problem.intervals, **arguments)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"scale": 0.0}, "scale=0.0"),
            ({"query": torch.zeros(4, 2, 16).double()}, "float64"),
            ({"key": torch.zeros(4, 2, 16).half()}, "float16"),
            ({"query": torch.zeros(4, 3, 16)}, "multiple of Hk"),
            ({"query": torch.zeros(5, 2, 16)}, "intervals are for 4 query"),
            ({"value": torch.zeros(4, 2, 12)}, "value head dimension 12"),
            ({"value": torch.zeros(4, 2, 520)}, "value head dimension 520"),
            ({"key": torch.zeros(4, 16, 2).mT}, "key strides"),
            ({"modifiers": Modifiers(softcap=-1.0)}, r"softcap=-1\.0"),
            ({"modifiers": Modifiers(dropout=1.0)}, r"dropout=1\.0"),
            ({"modifiers": Modifiers(dropout=0.5)}, "seed=None"),
            ({"modifiers": Modifiers(slopes=torch.zeros(4, 2))}, "query_positions=None"),
            ({"modifiers": Modifiers(slopes=torch.zeros(2, 4))}, r"slopes is torch\.float32 \(2, 4\)"),
            ({"modifiers": Modifiers(key_visible=torch.ones(4).bool())}, r"key_visible is torch\.bool"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_refused_arguments_are_named(changed: dict, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            attend_with(**changed)

    @settings(max_examples=20, deadline=None)
    @given(rows=st.integers(1, 700), dims=st.tuples(*[st.sampled_from([8, 24, 64, 128])] * 2))
    def test_rows_of_keys_and_values_are_laid_beside_each_other(rows: int, dims: tuple[int, int]) -> None:
        first, second = (torch.randn(rows, dim).bfloat16() for dim in dims)
        target = torch.zeros(rows * sum(dims) + 8, dtype=torch.bfloat16)
        lay_rows(first, second, target[:-8].view(torch.uint8))
        assert torch.equal(target[:-8].view(rows, -1), torch.cat([first, second], 1))
        assert not target[-8:].any()

    @settings(max_examples=20, deadline=None)
    @given(ranks=st.integers(1, 6), rows=st.integers(1, 700), first=st.integers(0, 9))
    def test_parts_of_several_ranks_are_added_in_their_order_bit_for_bit(ranks: int, rows: int, first: int) -> None:
        sums = [torch.randn(720, 2, dim) for dim in (8, 16)]
        expected, added = [x.clone() for x in sums], slice(first, first + rows)
        of_ranks = [(which, torch.randn(rows, *x.shape[1:])) for _ in range(ranks) for which, x in enumerate(sums)]
        parts = [Part(which, added, x.data_ptr(), lambda x=x: x) for which, x in of_ranks]
        add_rows(sums, parts)
        add_rows_by_torch(expected, parts)
        assert all(torch.equal(x, y) for x, y in zip(sums, expected, strict=True))

    @pytest.mark.parametrize("counts", [(9001,), (9001, 5), (5, 9001)])
    def test_numbers_are_rounded_as_torch_rounds_them(counts: tuple[int, ...]) -> None:
        exact = [1e3 * torch.randn(count) for count in counts]  # to fp16: the interpreter rounds bf16 towards zero
        rounded = [torch.zeros(len(x) + 8, dtype=torch.float16) for x in exact]
        round_numbers([(x, y[:-8]) for x, y in zip(exact, rounded, strict=True)])
        for x, y in zip(exact, rounded, strict=True):
            assert torch.equal(y[:-8], x.half())
            assert not y[-8:].any()
