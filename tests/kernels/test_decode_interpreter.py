"""The Triton kernels of the cache against float64 without a GPU, in Triton's interpreter.

As in test_triton_interpreter.py, the tests run in a pytest of their own that the one test of the ordinary run starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

if not triton.knobs.runtime.interpret:

    def test_triton_kernels_of_the_cache_pass_their_tests_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

else:
    from dataclasses import replace

    from decode_cases import CacheCase, assert_as_exact_as_torch, cache_cases, call, tensors
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from triton.runtime.interpreter import InterpreterBuilder

    from ringflash import flash_attn_with_kvcache
    from ringflash.flash_attn import kvcache
    from ringflash.kernels.decode import Cache
    from ringflash.kernels.triton import decode
    from ringflash.kernels.triton.decode import attend_cache

    @pytest.fixture(autouse=True, scope="module")
    def triton_on_the_cpu() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvcache, "select_decoding", lambda *problem: decode)
            yield

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

    def test_what_does_not_fit_is_not_written() -> None:
        cache = torch.zeros(2, 8, 1, 16)
        new, lengths = torch.ones(2, 5, 1, 16), torch.tensor([6, 2], dtype=torch.int32)
        decode.append(new, new, Cache(cache, cache.clone(), lengths))
        assert cache[..., 0, 0].tolist() == [[0] * 6 + [1] * 2, [0] * 2 + [1] * 5 + [0]]
