"""The kernels of the cache compile for chips that are not there and stay within registers and shared memory."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from aot import SHARED_LIMIT, Resources, catch, compile_for

from ringflash.kernels.decode import Cache, Rotary, Rules
from ringflash.kernels.triton.decode import append_cache, attend_cache
from ringflash.kernels.triton.decode.launch_sizes import MOST_SPLITS, choose_splits, launch_sizes

CHIPS = {"sm_80": "ampere", "sm_89": "consumer", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
PLAIN = Rules(scale=0.1)
FULL = Rules(0.1, left=100, right=0, softcap=5.0, slopes=torch.empty(2, 32, device="meta"))


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cache_of(dim: int, dtype: torch.dtype, page: int | None) -> Cache:
    if page is None:
        x = meta(2, 4096, 8, dim, dtype=dtype)
        return Cache(x, x, meta(2), leftpad=meta(2), batch_index=meta(2))
    x = meta(64, page, 8, dim, dtype=dtype)
    return Cache(x, x, meta(2), block_table=meta(2, 32))


def compile_attention(
    target: str,
    dtype: torch.dtype,
    dim: int,
    page: int | None = None,
    rules: Rules = PLAIN,
    queries: int = 1,
    multiprocessors: int = 132,
    splits: int = 1,
) -> Resources:
    """The kernel as `attend` launches it for 32 query heads on 8 key heads."""
    query, tables = meta(2, queries, 32, dim, dtype=dtype), meta(4096, dim // 2, dtype=dtype)
    rotary = None if rules is PLAIN else Rotary(tables, tables, interleaved=True)

    def launch() -> None:
        attend_cache.attend(query, cache_of(dim, dtype, page), rules, rotary, splits=splits)

    with (
        mock.patch.object(attend_cache, "chip_of", return_value=CHIPS[target]),
        mock.patch.object(attend_cache, "multiprocessors", return_value=multiprocessors),
    ):
        return compile_for(target, catch(attend_cache, "attend_cache_kernel", launch))


DIMS = [
    (torch.bfloat16, 64),
    (torch.bfloat16, 128),
    (torch.float16, 256),
    (torch.bfloat16, 512),
    (torch.float32, 128),
    (torch.float32, 256),
]


# Parts are merged not at all, and twice. Merging once is the second half of that.
@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize(
    ("dtype", "dim", "splits"), [*((*x, n) for x in DIMS for n in (1, 128)), (torch.bfloat16, 128, 16)], ids=str
)
def test_decoding_spills_nothing_and_shares_a_multiprocessor(
    target: str, dtype: torch.dtype, dim: int, splits: int
) -> None:
    compiled = compile_attention(target, dtype, dim, splits=splits)
    sizes = launch_sizes(CHIPS[target], dtype, dim, many=False)
    assert compiled.spilled == 0
    assert compiled.shared * sizes.resident <= SHARED_LIMIT[target]
    if splits > 1 and target != "gfx942":
        assert -(-compiled.registers // 8) * 8 * 32 * sizes.warps * min(sizes.resident, 2) <= 65536


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("page", [None, 256])
def test_more_sequences_than_the_chip_holds_fit(target: str, page: int | None) -> None:
    compiled = compile_attention(target, torch.bfloat16, 128, page, multiprocessors=4)
    assert compiled.spilled == 0
    assert SHARED_LIMIT[target] / 2 < compiled.shared <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("page", [None, 16, 256])
def test_keys_are_copied_16_bytes_at_a_time_as_far_ahead_with_pages_as_without(target: str, page: int | None) -> None:
    compiled = compile_attention(target, torch.bfloat16, 128, page)
    sizes = launch_sizes(CHIPS[target], torch.bfloat16, 128, many=False)
    in_a_block = 2 * sizes.keys * 128 * 2 // (16 * 32 * sizes.warps)
    assert compiled.spilled == 0
    # The prologue fills all stages but one, the loop fills that.
    assert compiled.assembly.count("cp.async.cg.shared.global") == sizes.stages * in_a_block


# Many rows with every feature leave a few registers short, once a block of keys at most.
@pytest.mark.parametrize(("target", "dim"), [("sm_80", 128), ("sm_90", 128), ("sm_90", 256), ("gfx942", 256)])
def test_prefill_with_every_feature_fits(target: str, dim: int) -> None:
    compiled = compile_attention(target, torch.bfloat16, dim, 256, FULL, queries=512)
    assert compiled.spilled <= 64
    assert compiled.shared <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", CHIPS)
def test_appending_compiles(target: str) -> None:
    new, tables = meta(2, 40, 8, 128, dtype=torch.bfloat16), meta(4096, 32, dtype=torch.bfloat16)
    cache, rotary = cache_of(128, torch.bfloat16, 256), Rotary(tables, tables, interleaved=False)
    appending = catch(append_cache, "append_kernel", lambda: append_cache.append(new, new, cache, rotary))
    assert compile_for(target, appending).spilled <= 16  # 32 rows a program


@pytest.mark.parametrize("splits", [16, 128])
@pytest.mark.parametrize("target", CHIPS)
def test_a_part_is_counted_behind_all_its_stores_and_before_others_are_loaded(target: str, splits: int) -> None:
    assembly = compile_attention(target, torch.bfloat16, 128, splits=splits).assembly
    if target == "gfx942":
        words = {
            "store": r"global_store_dwordx[24]",
            "wait": r"s_waitcnt vmcnt\(0\)\n",
            "barrier": r"s_barrier",
            "release": r"buffer_wbl2 sc1",
            "count": r"global_atomic_add",
            "acquire": r"buffer_inv sc1",
            "load": r"global_load_dwordx4",
        }
        expected = "store (wait )+(barrier )+release wait count wait acquire (barrier )+load "
    else:
        words = {
            "store": r"st\.global\.v4",
            "barrier": r"bar(?:rier)?\.sync",
            "count": r"atom\.global\.gpu\.acq_rel\.add",
            "load": r"ld\.global\.v4",
        }
        expected = "store barrier count barrier load "
    pattern = "|".join(f"(?P<{name}>{word})" for name, word in words.items())
    found = "".join(f"{x.lastgroup} " for x in re.finditer(pattern, assembly))
    assert found.count("count") == len(re.findall(expected, found)) == (1 if splits == 16 else 2)


@pytest.mark.parametrize("programs", [1, 8, 70, 100, 128, 512, 5000])
@pytest.mark.parametrize("blocks", [1, 7, 128, 1024, 16384])
def test_chosen_parts_fill_the_chip_and_no_more(programs: int, blocks: int) -> None:
    multiprocessors = 132
    splits = choose_splits(programs, blocks, multiprocessors)
    assert 1 <= splits <= min(MOST_SPLITS, blocks)
    assert splits in (MOST_SPLITS, blocks) or programs * splits >= 0.9 * multiprocessors
    assert splits == 1 or programs * splits <= 2 * multiprocessors
