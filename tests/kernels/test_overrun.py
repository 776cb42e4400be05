"""Lengths beyond a cache: what the host makes of the word, and that torch operators stay within the cache."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringflash import ArgumentError, flash_attn_with_kvcache
from ringflash.kernels import overrun
from ringflash.kernels.cpu import decode
from ringflash.kernels.decode import Cache, Rules

LENGTHS = torch.tensor([6, 2], dtype=torch.int32)
X = torch.randn(2, 1, 2, 8)


@pytest.fixture(autouse=True)
def no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrun, "_words", {})


def cache_of(lengths: Tensor | None, block_table: Tensor | None = None, offset: int = 0) -> Cache:
    shape = (2, 8, 2, 8) if block_table is None else (6, 4, 2, 8)
    return Cache(torch.zeros(shape), torch.zeros(shape), lengths, offset, block_table=block_table)


def decode_step(**changed: object) -> Tensor:
    cache = torch.zeros(2, 8, 2, 8)
    return flash_attn_with_kvcache(**{"q": X, "k_cache": cache, "v_cache": cache.clone(), "cache_seqlens": 3} | changed)


@pytest.mark.parametrize(
    ("block_table", "message"),
    [(None, "cache_seqlens .* rows that k_cache"), (torch.zeros(2, 2, dtype=torch.int32), "pages that block_table")],
    ids=["cache", "pages"],
)
@pytest.mark.parametrize("new", [{}, {"k": X, "v": X}, {"k": X[:, :0], "v": X[:, :0]}], ids=["read", "append", "none"])
def test_the_next_call_on_the_device_raises_once_before_it_writes(
    new: dict[str, Tensor], block_table: Tensor | None, message: str
) -> None:
    cache = cache_of(LENGTHS, block_table)
    overrun.overrun_word(cache).fill_(overrun.reason_code(cache))  # what a kernel does
    k_cache = torch.zeros(2, 8, 2, 8)
    with pytest.raises(ArgumentError, match=f"in an earlier call of flash_attn_with_kvcache on cpu, .*{message}"):
        decode_step(k_cache=k_cache, **new)
    assert not k_cache.any()
    decode_step(k_cache=k_cache, **new)


def test_what_is_compiled_hears_of_it_too() -> None:
    step = torch.compile(lambda: decode_step(k=X, v=X), fullgraph=True, backend="aot_eager")
    step()
    overrun.overrun_word(cache_of(LENGTHS)).fill_(overrun.BEYOND_CACHE)
    with pytest.raises(ArgumentError, match="in an earlier call"):
        step()
    step()


def test_a_call_does_not_hear_of_its_own_appending() -> None:
    """Which may be done before the call comes to attend."""
    word = overrun.overrun_word(cache_of(LENGTHS))
    append = decode.append

    def append_and_tell(*arguments: object) -> None:
        append(*arguments)
        word.fill_(overrun.BEYOND_CACHE)

    with mock.patch.object(decode, "append", append_and_tell):
        decode_step(k=X, v=X)
    with pytest.raises(ArgumentError, match="in an earlier call"):
        decode_step(k=X, v=X)


def test_other_devices_do_not_hear_of_it() -> None:
    overrun.overrun_word(Cache(torch.empty(2, 8, 2, 8, device="meta"), X, LENGTHS)).fill_(overrun.BEYOND_CACHE)
    overrun.raise_if_overrun("cpu")
    with pytest.raises(ArgumentError, match="on meta"):
        overrun.raise_if_overrun("meta")


def test_a_word_stays_where_it_is_and_numbers_known_to_the_host_need_none() -> None:
    word = overrun.overrun_word(cache_of(LENGTHS))
    assert overrun.overrun_word(cache_of(None, torch.zeros(2, 2, dtype=torch.int32), 3)).data_ptr() == word.data_ptr()
    assert overrun.overrun_word(cache_of(None, None, 3)) is None


def test_a_capture_that_comes_first_is_warned_of_and_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrun, "capturing", lambda device: True)
    with pytest.warns(UserWarning, match="captures the first call of flash_attn_with_kvcache on cpu"):
        assert overrun.overrun_word(cache_of(LENGTHS)) is None
    monkeypatch.setattr(overrun, "capturing", lambda device: False)
    word = overrun.overrun_word(cache_of(LENGTHS))
    monkeypatch.setattr(overrun, "capturing", lambda device: True)
    assert overrun.overrun_word(cache_of(LENGTHS)) is word


@pytest.mark.parametrize("new", [{}, {"k": X, "v": X}], ids=["read", "append"])
def test_compiled_calls_on_the_cpu_raise_at_once_by_name(new: dict[str, Tensor]) -> None:
    """Where no argument's values are looked at while compiling."""
    step = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    cache, table = torch.zeros(6, 4, 2, 8), torch.tensor([[2, 0], [3, -1]], dtype=torch.int32)
    used = 4 if new else 5
    for lengths, where, message in (
        ([0, used + 4], {}, "rows that k_cache does not have"),
        ([-2, 0], {}, "or are negative"),
        ([0, used], {"k_cache": cache, "v_cache": cache, "block_table": table}, "pages that block_table does not name"),
    ):
        step(cache_seqlens=LENGTHS.clamp(max=3), **where, **new)
        with pytest.raises(ArgumentError, match=message):
            step(cache_seqlens=torch.tensor(lengths, dtype=torch.int32), **where, **new)


@settings(max_examples=80)
@given(st.data())
def test_torch_operators_write_what_has_a_row_and_nothing_else(data: st.DataObject) -> None:
    """As on a GPU, where nothing is raised."""
    count = data.draw(st.integers(1, 5))
    lengths = torch.tensor(data.draw(st.lists(st.integers(-7, 13), min_size=2, max_size=2)), dtype=torch.int32)
    entries = data.draw(st.permutations(range(6)))
    table = [[entry if data.draw(st.booleans()) else -(2**30) for entry in entries[i : i + 2]] for i in (0, 2)]
    paged = data.draw(st.booleans())
    cache = cache_of(lengths, torch.tensor(table, dtype=torch.int32) if paged else None)
    for x in (cache.key, cache.value):
        x.copy_(torch.randn_like(x))
    key, value = torch.randn(2, 2, count, 2, 8).unbind(0)
    expected, missing = (cache.key.clone(), cache.value.clone()), 0
    for sequence in range(2):
        for token in range(count):
            row = int(lengths[sequence]) + token
            if not 0 <= row < 8 or (paged and table[sequence][row // 4] < 0):
                missing += 1
                continue
            place = (table[sequence][row // 4], row % 4) if paged else (sequence, row)
            for new, old in zip((key, value), expected, strict=True):
                old[place] = new[sequence, token]
    noted = []
    with mock.patch.object(decode, "refuse_or_note", lambda beyond, cache: noted.append(int(beyond.sum()))):
        decode.append(key, value, cache)
        out, _ = decode.attend(key, cache, Rules(0.3), appended=count)
    assert torch.equal(cache.key, expected[0])
    assert torch.equal(cache.value, expected[1])
    assert noted[0] == missing
    last = lengths + count - 1
    assert noted[1] >= int(((lengths < 0) | (last >= 8)).sum())
    assert not out.isnan().any()
