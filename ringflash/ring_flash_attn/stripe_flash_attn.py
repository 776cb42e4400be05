"""Sequences dealt out token by token, which levels the work of a causal mask: rank r passes `x[:, r::ranks]`."""

from __future__ import annotations

from torch import Tensor

from ringflash.flash_attn.arguments import Attention
from ringflash.parallel.mesh import Group
from ringflash.ring_flash_attn.arguments import attend_batch


def stripe_flash_attn_func(
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
    """`flash_attn_func` of sequences whose rank r holds tokens r, r + ranks, r + 2 * ranks and so on.

    A length that is new is planned token by token, which takes seconds for a hundred thousand tokens; the zigzag
    function levels the work as well and is planned at once.

    Args:
        q: (batch, s, nheads, headdim), this rank's tokens.
        k: (batch, s, nheads_k, headdim).
        v: (batch, s, nheads_k, headdim_v).
        dropout_p: see `ring_flash_attn_func`; so are those down to group.
        softmax_scale: see dropout_p.
        causal: see dropout_p.
        window_size: see dropout_p.
        alibi_slopes: see dropout_p.
        deterministic: see dropout_p.
        return_attn_probs: see dropout_p.
        group: see dropout_p.

    Returns:
        out (batch, s, nheads, headdim_v); with return_attn_probs (out, softmax_lse (batch, nheads, s) fp32, None).

    Raises:
        ArgumentError: an argument is not supported; raised before any communication, and told to the other ranks.
        RankMismatchError: ranks disagree on an argument, or another one raised an error.
    """
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_batch((q, k, v), "stripe", shared, group)


def stripe_flash_attn_kvpacked_func(
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
    """`stripe_flash_attn_func` with keys and values in one tensor, (batch, s, 2, nheads_k, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_batch((q, kv), "stripe", shared, group)


def stripe_flash_attn_qkvpacked_func(
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
    """`stripe_flash_attn_func` with queries, keys and values in one tensor, (batch, s, 3, nheads, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_batch((qkv,), "stripe", shared, group)
