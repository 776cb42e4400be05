"""Packed sequences, each of them cut into one piece for each rank.

Rank r passes piece r of each sequence, `sequence.chunk(ranks)[r]`, one behind the other.
"""

from __future__ import annotations

from torch import Tensor

from ringflash.flash_attn.arguments import Attention
from ringflash.parallel.mesh import Group
from ringflash.ring_flash_attn.arguments import attend_packed


def ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`flash_attn_varlen_func` of packed sequences of which rank r holds piece r of `ranks` equal pieces of each.

    Args:
        q: (total, nheads, headdim), this rank's piece of each sequence, one behind the other.
        k: (total, nheads_k, headdim).
        v: (total, nheads_k, headdim_v).
        cu_seqlens: (sequences + 1,) int32, where each sequence begins among this rank's tokens, and the end: the
            boundaries of the whole sequences divided by the number of ranks. Plans are made on the CPU: there
            it costs nothing, and on a device the host waits for it once for each tensor.
        max_seqlen: this rank's tokens of the longest sequence; checked, except under torch.compile.
        dropout_p: see `ring_flash_attn_func`; so are those down to window_size.
        softmax_scale: see dropout_p.
        causal: see dropout_p.
        window_size: see dropout_p.
        alibi_slopes: (nheads,) or (sequences, nheads) fp32, for distances in the whole sequence.
        deterministic: see `ring_flash_attn_func`; so are those down to group.
        return_attn_probs: see deterministic.
        group: see deterministic.

    Returns:
        out (total, nheads, headdim_v); with return_attn_probs (out, softmax_lse (nheads, total) fp32, None).

    Raises:
        ArgumentError: see `ring_flash_attn_func`.
        RankMismatchError: see `ring_flash_attn_func`.
    """
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_packed((q, k, v), cu_seqlens, max_seqlen, "contiguous_per_document", shared, group)


def ring_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`ring_flash_attn_varlen_func` with keys and values in one tensor, (total, 2, nheads_k, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_packed((q, kv), cu_seqlens, max_seqlen, "contiguous_per_document", shared, group)


def ring_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`ring_flash_attn_varlen_func` with queries, keys and values in one tensor, (total, 3, nheads, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return attend_packed((qkv,), cu_seqlens, max_seqlen, "contiguous_per_document", shared, group)
