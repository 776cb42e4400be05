"""Attention within one rectangle, in two ways: by torch's fused CPU operator, or by matrix products on any device.

Both are used as modules are: `prepare` once for a backward pass, `forward` and `backward` for each rectangle.

Legend: Hk key heads, G query heads of each, R rows and K keys of the rectangle, D head dimension, Dv value's. Tensors
come as (Hk, G, R, D) and (Hk, G, K, D); key and value repeat along G without taking memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.kernels.cpu.rectangles import Kind, Rectangle, visible
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers, keep_mask
from ringflash.kernels.torch_private import cpu_attention, cpu_attention_backward


class Scoring(NamedTuple):
    """How scores are made and which of them count: the same for all rectangles of a call."""

    intervals: KeyIntervals
    scale: float
    modifiers: Modifiers | None


class Fused:
    """Rectangles by torch's fused CPU operator; no modifiers, one head dimension for all."""

    @staticmethod
    def prepare(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """A pair (dout, out) whose row products are `delta`.

        The fused backward takes out only to form sum_d dout * out. That sum is given here, with the log-sum-exp's
        gradient already in it, so out becomes the multiple of dout that has it. A sum of squares loses nothing to
        cancellation.
        """
        largest = dout.abs().amax(-1, keepdim=True)
        # Where dout (all but) vanishes and delta does not, as for a loss of the log-sum-exp alone, no multiple reaches
        # it: a dout too small to be seen beside delta takes its place.
        least = delta.abs()[..., None] * 2.0**-60
        dout = torch.where(largest < least, least, dout)
        largest = torch.maximum(largest, least)
        direction = dout / torch.where(largest > 0, largest, 1)
        square = (direction * direction).sum(-1, keepdim=True)
        factor = delta[..., None] / (largest * square)
        return dout, direction * torch.where(largest > 0, factor, 0)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """(out, lse) of the rectangle's rows over its keys."""
        mask = visible(rectangle, scoring.intervals)
        out, lse = cpu_attention(
            q, k, v, is_causal=rectangle.kind is Kind.CAUSAL, attn_mask=_additive(mask, q.dtype), scale=scoring.scale
        )
        # The operator reports 0 for a row whose every key is masked.
        return out, lse if mask is None else lse.masked_fill(~mask.any(1), -torch.inf)

    @staticmethod
    def backward(
        dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the rectangle's pairs, dk and dv (Hk, K, D); `dout` and `out` as prepared."""
        dq, dk, dv = cpu_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dropout_p=0.0,
            is_causal=rectangle.kind is Kind.CAUSAL,
            attn_mask=_additive(visible(rectangle, scoring.intervals), q.dtype),
            scale=scoring.scale,
        )
        return dq, dk.sum(1), dv.sum(1)


class MatrixProducts:
    """Rectangles by plain matrix products, with everything that `Modifiers` can ask for."""

    @staticmethod
    def prepare(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """What `backward` takes as its first two arguments."""
        return dout, delta[..., None]

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """See `Fused.forward`."""
        scores, _ = _scores(q, k, rectangle, scoring)
        lse = torch.logsumexp(scores, -1)
        weights = scores.sub_(lse.nan_to_num(neginf=0.0)[..., None]).exp_()
        if scoring.modifiers is not None and scoring.modifiers.dropout:
            weights *= _dropout_factor(weights, rectangle, scoring.modifiers)
        return _by_key_head(weights, v), lse

    @staticmethod
    def backward(
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rectangle: Rectangle,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Fused.backward`."""
        scores, slope = _scores(q, k, rectangle, scoring)
        weights = scores.sub_(lse[..., None]).exp_()
        dweights = _by_key_head(dout, v.mT)
        shown = weights
        if scoring.modifiers is not None and scoring.modifiers.dropout:
            factor = _dropout_factor(weights, rectangle, scoring.modifiers)
            dweights, shown = dweights.mul_(factor), weights * factor
        dscores = dweights.sub_(delta).mul_(weights).mul_(slope)
        dk = dscores.flatten(1, 2).mT @ q.flatten(1, 2)
        dv = shown.flatten(1, 2).mT @ dout.flatten(1, 2)
        return _by_key_head(dscores, k), dk, dv


def _scores(q: Tensor, k: Tensor, rectangle: Rectangle, scoring: Scoring) -> tuple[Tensor, Tensor | float]:
    """Modified scores (Hk, G, R, K), -inf where hidden, and their derivative by q . k."""
    scores = _by_key_head(q, k.mT).mul_(scoring.scale)
    slope: Tensor | float = scoring.scale
    mask, modifiers = visible(rectangle, scoring.intervals), scoring.modifiers
    if modifiers is not None:
        if modifiers.softcap:
            bent = torch.tanh(scores / modifiers.softcap)
            scores, slope = bent * modifiers.softcap, (1 - bent * bent) * scoring.scale
        if modifiers.slopes is not None:
            assert modifiers.query_positions is not None  # both come with slopes
            assert modifiers.key_positions is not None
            far = modifiers.query_positions[rectangle.rows, None] - modifiers.key_positions[None, rectangle.keys]
            slopes = modifiers.slopes[rectangle.rows].T.unflatten(0, (-1, q.shape[1]))[rectangle.heads, ..., None]
            scores = scores - slopes.to(scores.dtype) * far.abs()
        if modifiers.key_visible is not None:
            shown = modifiers.key_visible[None, rectangle.keys] != 0
            mask = shown if mask is None else mask & shown
    return scores if mask is None else scores.masked_fill_(~mask, -torch.inf), slope


def _dropout_factor(weights: Tensor, rectangle: Rectangle, modifiers: Modifiers) -> Tensor:
    heads = weights.shape[0] * weights.shape[1]
    first_head = modifiers.first_head + (rectangle.heads.start or 0) * weights.shape[1]
    modifiers = replace(modifiers, first_head=first_head)
    pairs = keep_mask(modifiers, heads, rectangle.rows, rectangle.keys).unflatten(0, weights.shape[:2])
    return pairs.to(weights.dtype) / (1 - modifiers.dropout)


def _by_key_head(x: Tensor, of_keys: Tensor) -> Tensor:
    """Rows of (Hk, G, R, n) times the (n, m) matrix of their key head."""
    return (x.flatten(1, 2) @ of_keys[:, 0]).unflatten(1, x.shape[1:3])


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
