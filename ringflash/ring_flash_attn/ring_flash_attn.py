"""Sequences cut into one piece for each rank: rank r passes `x.chunk(ranks, dim=1)[r]`."""

from __future__ import annotations

from torch import Tensor

from ringflash.flash_attn.arguments import Attention
from ringflash.parallel.mesh import Group
from ringflash.ring_flash_attn.arguments import attend_batch


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`flash_attn_func` of sequences whose rank r holds piece r of `ranks` equal pieces.

    Args:
        q: (batch, s, nheads, headdim), this rank's piece.
        k: (batch, sk, nheads_k, headdim).
        v: (batch, sk, nheads_k, headdim_v).
        dropout_p: probability of dropping a pair. Ranks that were given the same `torch.manual_seed` drop what one
            device would.
        softmax_scale: factor of the scores; 1 / sqrt(headdim) if None.
        causal: a query sees no later key.
        window_size: (left, right), how many keys before and behind itself a query sees in the whole sequence; -1 for
            no bound.
        alibi_slopes: (nheads,) or (batch, nheads) fp32, for distances in the whole sequence.
        deterministic: gradients repeat bit for bit.
        return_attn_probs: return softmax_lse as well, and None, where flash-attn has what dropout took.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group; one device without any.

    Returns:
        out (batch, s, nheads, headdim_v); with return_attn_probs (out, softmax_lse (batch, nheads, s) fp32, None).

    Raises:
        ArgumentError: an argument is not supported; raised before any communication, and told to the other ranks.
        RankMismatchError: ranks disagree on an argument, or another one raised an error.
    """
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_batch((q, k, v), "contiguous", shared, group)


def ring_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`ring_flash_attn_func` with keys and values in one tensor, (batch, sk, 2, nheads_k, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_batch((q, kv), "contiguous", shared, group)


def ring_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`ring_flash_attn_func` with queries, keys and values in one tensor, (batch, s, 3, nheads, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_batch((qkv,), "contiguous", shared, group)
