"""Lengths beyond a cache of keys and values: how a device that nobody waits for tells of them.

Before a launch nobody knows whether a sequence's length on a GPU leaves room for its new keys: reading it would be a
wait. So kernels stay within the cache, and where they had to they store into a word of page-locked host memory which
argument went too far. The next call reads that word, its own memory, and raises. The word of a device never moves and
is never given back, so CUDA graphs store into it too, whenever they are replayed.

On the CPU lengths are at hand, and the call itself raises.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.decode import Cache
from ringflash.kernels.kept import capturing
from ringflash.kernels.torch_private import without_transforms

BEYOND_CACHE = 1
BEYOND_PAGES = 2
"""What a word may hold; 0 for neither."""

_REASONS = {
    BEYOND_CACHE: "cache_seqlens and the new tokens need rows that k_cache does not have, or are negative",
    BEYOND_PAGES: "cache_seqlens and the new tokens need pages that block_table does not name or k_cache does not "
    "have, or are negative",
}

_words: dict[torch.device, tuple[Tensor, np.ndarray]] = {}
"""The word of each device, as kernels and as the host see it; graphs hold their addresses, so they stay."""


def reason_code(cache: Cache) -> int:
    """Which argument goes too far where lengths go beyond this cache."""
    return BEYOND_CACHE if cache.block_table is None else BEYOND_PAGES


def overrun_word(cache: Cache) -> Tensor | None:
    """The word (1,) int32 of the cache's device; None where nothing on the device can go beyond the cache.

    A first call that is being captured finds no memory: a capture forbids to lock pages. It warns and goes without.
    """
    device = cache.key.device
    if device not in _words:
        if capturing(device):
            warnings.warn(
                f"a CUDA graph captures the first call of flash_attn_with_kvcache on {device}: lengths beyond the "
                "cache will go unnoticed in it. Make one call before the capture",
                stacklevel=2,
            )
            return None
        with without_transforms(), torch.inference_mode(False):
            word = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        _words.setdefault(device, (word, word.numpy()))  # the first of two threads is the one that both take
    return None if cache.lengths is None and cache.block_table is None else _words[device][0]


def raise_if_overrun(device: torch.device | str) -> None:
    """Raise if lengths went beyond a cache in an earlier call on this device that it has come to by now.

    Waits for nothing, and tells of each overrun once. `flash_attn_with_kvcache` asks before it launches; where only a
    CUDA graph is replayed, no call does, and whoever replays it may ask.

    Args:
        device: of the cache.

    Raises:
        ArgumentError: names the argument.

    Example:
        >>> raise_if_overrun("cpu")
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = _words.get(device)
    if found is None or not found[1][0]:
        return
    reason, found[1][0] = _REASONS[int(found[1][0])], 0
    raise ArgumentError(
        f"in an earlier call of flash_attn_with_kvcache on {device}, {reason}. New keys without a place were not "
        "written, and what that call returned means nothing"
    )


def refuse_or_note(overrun: Tensor, cache: Cache) -> None:
    """For torch operators: raise on the CPU if any of `overrun` is true, and elsewhere set the word.

    Args:
        overrun: bool, on the cache's device.
        cache: where lengths may go beyond.
    """
    if overrun.device.type == "cpu":
        if overrun.any():
            raise ArgumentError(_REASONS[reason_code(cache)])
        return
    word = overrun_word(cache)
    if word is not None:  # the word takes the way to the device and back in the stream's order: what it holds stays
        held = word.to(overrun.device, non_blocking=True)
        word.copy_(held.masked_fill(overrun.any(), reason_code(cache)), non_blocking=True)
