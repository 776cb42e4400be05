"""The Triton kernels of the cache against float64 without a GPU, in Triton's interpreter.

As in test_triton_interpreter.py, the tests run in a pytest of their own that the one test of the ordinary run starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreted import assert_passes_in_interpreter

triton = pytest.importorskip("triton")

if not triton.knobs.runtime.interpret:

    def test_triton_kernels_of_the_cache_pass_their_tests_in_the_interpreter() -> None:
        assert_passes_in_interpreter(__file__)

else:
    from contextlib import nullcontext
    from dataclasses import replace

    from decode_cases import CacheCase, assert_as_exact_as_torch, cache_cases, call, tensors
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from triton.runtime.interpreter import InterpreterBuilder

    from ringflash import ArgumentError, flash_attn_with_kvcache
    from ringflash.flash_attn import kvcache
    from ringflash.kernels import overrun
    from ringflash.kernels.decode import Cache, Rules
    from ringflash.kernels.triton import decode
    from ringflash.kernels.triton.decode import attend_cache

    @pytest.fixture(autouse=True, scope="module")
    def triton_on_the_cpu() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvcache, "select_decoding", lambda *problem: decode)
            yield

    @pytest.fixture(autouse=True)
    def no_words(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(overrun, "_words", {})

    def check(case: CacheCase) -> None:
        problem = tensors(case)
        assert_as_exact_as_torch(call(flash_attn_with_kvcache, case, problem), case, problem)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    @settings(max_examples=25)
    @given(data=st.data())
    def test_any_combination_of_arguments(dtype: torch.dtype, data: st.DataObject) -> None:
        check(data.draw(cache_cases(dtype)))

    @pytest.mark.parametrize("page", [None, 5, 32])
    @pytest.mark.parametrize("splits", [0, 1, 40])
    def test_one_part_and_more_than_there_are_blocks(page: int | None, splits: int) -> None:
        case = CacheCase(1, 1, 1, 500, page, (4, 1), rotary=16, causal=True, splits=splits, seed=5)
        check(case)
        check(replace(case, window=(40, 0)))

    def test_more_rows_than_a_tile_holds() -> None:
        case = CacheCase(2, 23, 23, 90, None, (8, 2), (24, 40), causal=True, rotary=8, interleaved=False)
        check(case)
        check(replace(case, window=(11, -1), batch_index=True, softcap=3.0, alibi="sequences"))

    @pytest.mark.parametrize("splits", [3, 20])
    def test_bits_do_not_depend_on_which_program_is_last_and_counters_are_set_back(
        splits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = CacheCase(1, 10, None, 350, None, (8, 2), (16, 24), splits=splits, seed=2)
        problem = tensors(case)
        counters = torch.zeros(1000, dtype=torch.int32)
        monkeypatch.setattr(attend_cache, "counters", lambda count, device: counters)
        first = call(flash_attn_with_kvcache, case, problem)[:2]
        assert_as_exact_as_torch(call(flash_attn_with_kvcache, case, problem), case, problem)
        set_place = InterpreterBuilder.set_grid_idx
        for seed in range(2):

            def shuffled(builder: InterpreterBuilder, x: int, y: int, z: int, seed: int = seed) -> None:
                order = torch.randperm(builder.grid_dim[0], generator=torch.Generator().manual_seed(seed))
                set_place(builder, int(order[x]), y, z)

            monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shuffled)
            for a, b in zip(first, call(flash_attn_with_kvcache, case, problem)[:2], strict=True):
                assert torch.equal(a, b)
            assert not counters.any()

    @pytest.mark.parametrize("splits", [1, 5, 20])
    def test_a_row_of_nan_has_an_lse_of_nan(splits: int) -> None:
        case = CacheCase(1, 1, None, 500, None, (2, 1), splits=splits)
        problem = tensors(case)
        problem.q[:, :, 1] = torch.nan
        lse = call(flash_attn_with_kvcache, case, problem)[1]
        assert lse.isnan().tolist() == [[[False], [True]]]

    @pytest.mark.parametrize("page", [None, 2, 16], ids=["cache", "pages-smaller-than-blocks", "pages-of-blocks"])
    @pytest.mark.parametrize("lengths", [[13, 2], [2, -3], [15, 16], [2**31 - 2, -(2**31)], [2, 11]], ids=str)
    def test_what_does_not_fit_is_not_written_and_the_next_call_raises(lengths: list[int], page: int | None) -> None:
        new, used = torch.ones(2, 5, 1, 16), torch.tensor(lengths, dtype=torch.int32)
        table = None if page is None else torch.arange(32 // page, dtype=torch.int32).view(2, -1).flip(1)
        cache = torch.zeros(32, 1, 16).unflatten(0, (-1, page or 16))
        written = Cache(cache, cache.clone(), used, block_table=table)
        decode.append(new, new, written)
        expected = [[float(n <= row < n + 5) for row in range(16)] for n in lengths]
        rows = cache if table is None else cache[table.long()].flatten(1, 2)
        assert rows[..., 0, 0].tolist() == expected
        held = used.where(used < 0, used + 5)  # which overflows where it is largest
        runs = (
            lambda: None,
            lambda: decode.attend(new, written, Rules(0.3), appended=5),
            lambda: decode.attend(new, replace(written, lengths=held), Rules(0.3)),
        )
        for run in runs:
            run()
            fits = lengths == [2, 11]
            with nullcontext() if fits else pytest.raises(ArgumentError, match=r"earlier call.*cache_seqlens"):
                overrun.raise_if_overrun("cpu")

    @pytest.mark.parametrize("page", [2, 16])
    def test_pages_that_are_not_there_are_neither_written_nor_read(page: int) -> None:
        """Fillers behind the pages of a sequence that has grown too long."""
        fillers = torch.tensor([[1, -1], [0, 9]], dtype=torch.int32)
        guard = torch.full((4 * page, 1, 16), torch.nan)
        guard[page : 3 * page] = 0.0
        cache = guard[page : 3 * page].unflatten(0, (2, page))
        used, new = torch.tensor([page, page - 1], dtype=torch.int32), torch.ones(2, 2, 1, 16)
        written = Cache(cache, cache, used, block_table=fillers)
        decode.append(new, new, written)
        assert guard.nan_to_num()[:, 0, 0].nonzero().flatten().tolist() == [2 * page - 1]
        with pytest.raises(ArgumentError, match=r"earlier call.*pages that block_table does not name"):
            overrun.raise_if_overrun("cpu")
        out, _ = decode.attend(new, written, Rules(0.3), appended=2)
        assert not out.isnan().any()
        with pytest.raises(ArgumentError, match=r"earlier call.*pages that block_table does not name"):
            overrun.raise_if_overrun("cpu")
