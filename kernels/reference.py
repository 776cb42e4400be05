"""Attention by its definition, dense and in float64: the oracle that every other kernel is held against.

It also states the contract that all kernels share. They differ in speed and memory, never in meaning:

    out[t, h] = sum_s softmax_s(scale * query[t, h] . key[s, h // group]) value[s, h // group],  s visible to t
    lse[h, t] = log sum_s exp(scale * query[t, h] . key[s, h // group])

`modifiers` change scores and weights as ringflash.kernels.modifiers says. Rows that see no key have out 0, lse -inf and
zero gradients. With blocks in `intervals`, keys visible to t are those visible to it for the group of heads of h.
`carry` is the state after earlier launches over other keys: the result is then the attention over all keys so far,
merged by their log-sum-exp (Liu et al., Ring Attention, arXiv 2310.01889; Milakov & Gimelshein, arXiv 1805.02867).

Legend: T query rows, S key rows, H query heads, Hk key heads (H a multiple of Hk), D head dimension, Dv value's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import check_blocks
from ringflash.kernels.modifiers import Modifiers, keep_mask
from ringflash.kernels.sums import add_rows as add_rows

Carry = tuple[Tensor, Tensor]
"""(out (T, H, Dv) fp32, lse (H, T) fp32) after the launches so far."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Carry | None = None,
    out_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> Carry:
    """Attention of every query row to the key rows it may see, merged into `carry`.

    Args:
        query: (T, H, D), last dimension contiguous.
        key: (S, Hk, D), last dimension contiguous.
        value: (S, Hk, Dv), last dimension contiguous.
        intervals: visible key rows of each query row.
        scale: factor of the scores before the softmax.
        modifiers: softcap, ALiBi, dropout and padding, if any.
        carry: result over earlier keys, fp32; implementations may overwrite it.
        out_dtype: dtype of the returned out; the query's if None. Stages before the last ask for float32.
        sinks: (H,) learned logits that join each row's sum without a value, in a row's last launch; floats or None.

    Returns:
        out (T, H, Dv) in out_dtype and lse (H, T) fp32, natural logarithm.
    """
    scores, _ = _scores(query, key, intervals, scale, modifiers)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None].nan_to_num(neginf=0.0)) * _dropout_factor(modifiers, query)
    out = torch.einsum("hts,shd->thd", weights, _per_query_head(value, query.shape[1]))
    if carry is not None:
        earlier_out, earlier_lse = carry[0].double(), carry[1].double()
        merged = torch.logaddexp(lse, earlier_lse)
        out = out * _share(lse, merged).T[..., None] + earlier_out * _share(earlier_lse, merged).T[..., None]
        lse = merged
    if sinks is not None:
        merged = torch.logaddexp(lse, sinks.double()[:, None])
        out, lse = out * _share(lse, merged).T[..., None], merged
    return out.to(out_dtype or query.dtype), lse.float()


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Tensor | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` over these keys, given the log-sum-exp over all keys (Dao, arXiv 2307.08691, algorithm 2).

    Args:
        dout: (T, H, Dv), gradient of out.
        query: as in `attend`; so are key, value, intervals and scale.
        key: see query.
        value: see query.
        lse: (H, T) fp32, over all keys of all launches.
        delta: (H, T) fp32 from `row_delta`.
        intervals: visible key rows of each query row.
        scale: factor of the scores before the softmax.
        modifiers: as in `attend`.
        carry: (T, H, D) fp32, gradient of query from earlier launches, to be added to; may be overwritten.
        dquery_dtype: dtype of the returned query gradient; the query's if None.
        dkey_dtype: dtype of the returned key and value gradients; the key's if None.
        deterministic: repeat bit for bit, also where adding in any order would be faster.

    Returns:
        dquery (T, H, D), dkey (S, Hk, D), dvalue (S, Hk, Dv). Key rows that no query sees get zeros.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    scores, slope = _scores(query, key, intervals, scale, modifiers)
    weights = torch.exp(scores - lse.double()[..., None].nan_to_num(neginf=0.0))
    factor = _dropout_factor(modifiers, query)
    dweights = torch.einsum("thd,shd->hts", dout.double(), _per_query_head(value, heads)) * factor
    dscores = weights * (dweights - delta.double()[..., None]) * slope
    dquery = torch.einsum("hts,shd->thd", dscores, _per_query_head(key, heads))
    dkey = torch.einsum("hts,thd->shd", dscores, query.double()).unflatten(1, (key_heads, -1)).sum(2)
    dvalue = torch.einsum("hts,thd->shd", weights * factor, dout.double()).unflatten(1, (key_heads, -1)).sum(2)
    if carry is not None:
        dquery = dquery + carry
    key_dtype = dkey_dtype or key.dtype
    return dquery.to(dquery_dtype or query.dtype), dkey.to(key_dtype), dvalue.to(key_dtype)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """sum_d dout * out - dlse for each row and head, (H, T) fp32: what the softmax's gradient subtracts.

    Args:
        dout: (T, H, Dv), gradient of out.
        out: (T, H, Dv), the final result.
        dlse: (H, T) or None, gradient of the log-sum-exp.
    """
    delta = (dout.double() * out.double()).sum(-1).T
    return (delta if dlse is None else delta - dlse).float().contiguous()


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of learned sinks, (H,): their value is 0, so only the sum that they join depends on them.

    Args:
        sinks: (H,), as in `attend`.
        lse: (H, T) fp32 of the final result, with the sinks.
        delta: (H, T) fp32 from `row_delta`.
    """
    shares = _share(sinks.double()[:, None], lse.double())
    return -(shares * delta.double()).sum(1).to(sinks.dtype)


def _scores(
    query: Tensor, key: Tensor, intervals: KeyIntervals, scale: float, modifiers: Modifiers | None
) -> tuple[Tensor, Tensor | float]:
    """Modified scores (H, T, S), -inf where hidden, and their derivative by query . key."""
    scores = torch.einsum("thd,shd->hts", query.double(), _per_query_head(key, query.shape[1])) * scale
    slope: Tensor | float = scale
    hidden = ~intervals.visible()
    if intervals.blocks is not None:
        check_blocks(intervals.blocks, query, key)
        hidden = hidden.repeat_interleave(query.shape[1] // len(hidden), dim=0)
    if modifiers is not None:
        if modifiers.softcap:
            bent = torch.tanh(scores / modifiers.softcap)
            scores, slope = modifiers.softcap * bent, scale * (1 - bent * bent)
        if modifiers.slopes is not None:
            assert modifiers.query_positions is not None  # both come with slopes
            assert modifiers.key_positions is not None
            distance = modifiers.query_positions.double()[:, None] - modifiers.key_positions.double()[None, :]
            scores = scores - modifiers.slopes.double().T[..., None] * distance.abs()
        if modifiers.key_visible is not None:
            hidden = hidden | (modifiers.key_visible == 0)
    return scores.masked_fill(hidden, -torch.inf), slope


def _dropout_factor(modifiers: Modifiers | None, query: Tensor) -> Tensor | float:
    if modifiers is None or not modifiers.dropout:
        return 1.0
    return keep_mask(modifiers, query.shape[1]).double() / (1 - modifiers.dropout)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    return x.double().repeat_interleave(heads // x.shape[1], dim=1)


def _share(lse: Tensor, merged: Tensor) -> Tensor:
    return torch.exp(lse - merged.nan_to_num(neginf=0.0))
