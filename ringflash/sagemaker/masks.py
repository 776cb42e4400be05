"""Attention masks as models pass them, read for what attention takes beside causality: keys that nobody may see, ALiBi.

A mask is honoured exactly or refused. Where that depends on its values the host waits for them, once for all layers
that are given the same tensor.

Legend: B sequences, s query and sk key tokens of one sequence on this rank, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.kept import TensorNotes

HIDDEN = -1e4
"""Added to a score, this or less hides a key: beside any other key its weight underflows to 0."""

_answers: TensorNotes[dict[Hashable, Any]] = TensorNotes()
"""What a mask said, by what it was asked."""

_names: TensorNotes[object] = TensorNotes()
"""An object that stands for what a tensor holds now."""


def visible_keys(mask: Tensor | None, batch: int, queries: int, keys: int, causal: bool) -> Tensor | None:
    """(B, sk) bool, False for keys that nobody may see; None without a mask.

    Args:
        mask: (B, sk) bool or integers, 0 for a key that nobody may see. Or (B, 1, 1, sk) or (B, 1, s, sk): bool, True
            for what may be seen, or floats that are added to scores; B may be 1. One with a row for each query has to
            say the same as `causal` and keys that nobody may see.
        batch: B.
        queries: s.
        keys: sk.
        causal: attention is causal, the last query at the last key; otherwise every query sees every key.

    Raises:
        ArgumentError: the mask has another form, or says more.
    """
    if mask is None:
        return None
    mask = _tensor(mask)
    rows = (mask != 0)[:, None, None] if mask.dim() == 2 and not mask.is_floating_point() else mask
    has_type = rows.dtype == torch.bool or rows.is_floating_point()
    if not has_type or not _fits(rows, ((1, batch), (1,), (1, queries), (keys,))):
        raise ArgumentError(
            f"attn_mask is {mask.dtype} {tuple(mask.shape)}; allowed are {(batch, keys)} bool or integers, and "
            f"{(batch, 1, 1, keys)} or {(batch, 1, queries, keys)} bool or floats"
        )
    if rows.dtype == torch.bool and rows.shape[2] == 1:
        visible = rows[:, 0, 0]
    else:
        visible = _read_once(rows, ("visible keys", causal), lambda: _visible_keys(rows, causal))
    return visible.expand(batch, keys)


def alibi(mask: Tensor | None, batch: int, heads: int, keys: int) -> tuple[Tensor, Tensor | None]:
    """ALiBi's slopes, fp32 (H,) or (B, H), and visible keys as of `visible_keys`, from the biases of causal attention.

    Softmax takes no notice of what is added to a whole row, so of biases that rise with the key only the slope matters.

    Args:
        mask: (B, H, 1, sk) fp32, added to scores: rising evenly from key to key, -inf for a key that nobody may see;
            B may be 1.
        batch: B.
        heads: H.
        keys: sk.

    Raises:
        ArgumentError: the mask has another form, or does not rise evenly.
    """
    mask = _tensor(mask)
    if mask.dtype != torch.float32 or not _fits(mask, ((1, batch), (heads,), (1,), (keys,))):
        raise ArgumentError(
            f"attn_mask is {mask.dtype} {tuple(mask.shape)}; with use_alibi=True allowed is float32 of "
            f"{(batch, heads, 1, keys)}, or of 1 for the batch"
        )
    slopes, visible = _read_once(mask, "alibi", lambda: _alibi(mask[:, :, 0]))
    return slopes, visible.expand(batch, keys)


def is_only_causal(mask: Tensor, position_ids: Tensor | None) -> bool:
    """Whether a mask says no more than that attention is causal, or that it is among tokens whose positions adjoin.

    Transformers makes the latter where it is given no padding: it takes any gap between two positions for the end of a
    document, as there are between the pieces of a sequence that a rank holds.

    Args:
        mask: (B, 1, s, s) bool, or floats that are added to scores; B may be 1.
        position_ids: (B, s); B may be 1. None if positions are not to be looked at.
    """
    if mask.shape[-2] != mask.shape[-1]:
        return False
    if position_ids is None:
        return _read_once(mask, "only causal", lambda: _is_only_causal(mask, None))
    name = _names.get(position_ids) or object()
    _names.put(position_ids, name)
    return _read_once(mask, ("only causal", name), lambda: _is_only_causal(mask, position_ids))


def _tensor(mask: object) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ArgumentError(f"attn_mask is a {type(mask).__name__}; allowed is a tensor")
    return mask


def _fits(mask: Tensor, sizes: tuple[tuple[int, ...], ...]) -> bool:
    return mask.dim() == len(sizes) and all(n in allowed for n, allowed in zip(mask.shape, sizes, strict=True))


def _read_once(mask: Tensor, question: Hashable, read: Callable[[], Any]) -> Any:
    if torch.compiler.is_compiling():
        raise ArgumentError(
            f"attn_mask is {mask.dtype} {tuple(mask.shape)}, and torch.compile cannot look at what it holds; pass keys "
            "that may be seen, bool (batch, 1, 1, keys)"
        )
    answers = _answers.get(mask)
    if answers is None:
        answers = {}
        _answers.put(mask, answers)
    if question not in answers:
        answers[question] = read()
    return answers[question]


def _seen(mask: Tensor) -> Tensor:
    """Which pairs a mask shows, of the mask's shape."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not (seen | (mask <= HIDDEN)).all():
        raise ArgumentError(
            f"attn_mask adds other numbers than 0 and {HIDDEN:g} or less; attention takes masks, and biases as "
            "ALiBi's slopes only"
        )
    return seen


def _visible_keys(mask: Tensor, causal: bool) -> Tensor:
    """(B, sk) of a mask (B, 1, s or 1, sk)."""
    seen = _seen(mask[:, 0])
    _, queries, keys = seen.shape
    visible = seen[:, -1:].all(1)  # the last query sees all that anyone does
    said = visible[:, None].expand_as(seen)
    if causal and queries > 1:
        said = said & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    if not torch.equal(seen, said):
        raise ArgumentError(
            f"attn_mask {tuple(mask.shape)} says more than causal={causal} and keys that nobody may see; pass "
            "documents as sharding=ringflash.Sharding(cu_seqlens=...), masks to ringflash.DistributedFlashAttention"
        )
    return visible


def _is_only_causal(mask: Tensor, position_ids: Tensor | None) -> bool:
    seen = _seen(mask[:, 0])
    causal = torch.ones(seen.shape[1:], dtype=torch.bool, device=mask.device).tril()
    if torch.equal(seen, causal.expand_as(seen)):
        return True
    if position_ids is None or position_ids.shape[-1] != seen.shape[-1]:
        return False
    piece = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    said = causal & (piece[:, :, None] == piece[:, None, :])
    return torch.equal(*torch.broadcast_tensors(seen, said))


def _alibi(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes (B, H), or (H,) if B is 1, and visible keys (B, sk), of biases (B, H, sk)."""
    hidden = bias.isneginf()
    visible = ~hidden[:, 0]
    if not torch.equal(hidden, hidden[:, :1].expand_as(hidden)):
        raise ArgumentError("attn_mask hides other keys from one head than from another")
    bias = bias.double().masked_fill(hidden, 0)
    keys = bias.shape[-1]
    first = visible.int().argmax(-1)
    last = keys - 1 - visible.flip(-1).int().argmax(-1)
    at_first, at_last = (bias.gather(-1, place[:, None, None].expand(*bias.shape[:2], 1)) for place in (first, last))
    slopes = (at_last - at_first) / (last - first).clamp(min=1)[:, None, None]
    line = at_first + slopes * (torch.arange(keys, device=bias.device) - first[:, None, None])
    rounding = 8 * torch.finfo(torch.float32).eps * bias.abs().max()
    if ((bias - line).masked_fill(hidden, 0).abs() > rounding).any():
        raise ArgumentError("attn_mask does not rise evenly from key to key, as the biases of ALiBi do")
    slopes = slopes[..., 0].float()
    return slopes[0] if len(slopes) == 1 else slopes, visible
