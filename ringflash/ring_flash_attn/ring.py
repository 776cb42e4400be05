"""The functions of `ringflash.flash_attn` over sequences whose tokens are sharded over the ranks of a group.

    q, k, v = (ringflash.shard(x, dim=1) for x in (q, k, v))
    out = ring_flash_attn_func(q, k, v, causal=True)        # this rank's rows of flash_attn_func's result

Arguments and results mean what they mean there, of this rank's tokens; places, windows and ALiBi distances are those
of the whole sequence. Dropout drops what one device would drop, if all ranks share the seed of torch's generator.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import Attention, Options, attend_batch, rows_together, unpack
from ringflash.functional import attention
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import Group, group_size
from ringflash.parallel.positions.partition import Partition


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    partition: str | Partition = "zigzag",
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
) -> Attention:
    """`flash_attn_func` over the ranks of a group.

    Args:
        q: (batch, s, nheads, headdim), as `ringflash.shard` gives them.
        k: (batch, sk, nheads_k, headdim).
        v: (batch, sk, nheads_k, headdim_v).
        dropout_p: see `ringflash.flash_attn`; so are those down to return_attn_probs.
        softmax_scale: see dropout_p.
        causal: see dropout_p.
        window_size: see dropout_p.
        softcap: see dropout_p.
        alibi_slopes: see dropout_p.
        deterministic: see dropout_p.
        return_attn_probs: see dropout_p. S_dmask needs all keys, so with dropout it is given on one rank only.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group; one device without any.
        partition: how tokens are sharded, as in `ringflash.shard`; "contiguous" for tokens cut into one piece for
            each rank, in order.
        seqlen_q: queries of a sequence on all ranks together; needed where not every rank holds the same number.
        seqlen_k: likewise for keys.

    Returns:
        out (batch, s, nheads, headdim_v); with return_attn_probs also softmax_lse (batch, nheads, s), and S_dmask.
    """
    try:
        options = Options.of(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )
        _check_probabilities(options, group)
        q, k, v = (rows_together(name, x, 4) for name, x in (("q", q), ("k", k), ("v", v)))
    except Exception as error:
        refuse(group, error)
        raise
    return attend_batch(q, k, v, options, group, partition, seqlen_q, seqlen_k)


def ring_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    partition: str | Partition = "zigzag",
    seqlen: int | None = None,
) -> Attention:
    """`ring_flash_attn_func` with queries, keys and values in one tensor, (batch, s, 3, nheads, headdim)."""
    return ring_flash_attn_func(
        *_unpack(qkv, 5, group),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        partition,
        seqlen,
        seqlen,
    )


def ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    partition: str | Partition = "zigzag",
    seqlen: int | None = None,
) -> Attention:
    """`flash_attn_varlen_func` of packed sequences to themselves, over the ranks of a group.

    Args:
        q: (s, nheads, headdim), this rank's tokens of all sequences laid end to end, as `ringflash.shard` gives them
            for its mask, documents included.
        k: (s, nheads_k, headdim).
        v: (s, nheads_k, headdim_v).
        cu_seqlens: (sequences + 1,), where each sequence begins among the tokens of all ranks, and the end; a list, or
            a tensor on the CPU.
        max_seqlen: length of the longest sequence; checked, except under torch.compile.
        dropout_p: see `ring_flash_attn_func`; so are those down to partition.
        softmax_scale: see dropout_p.
        causal: see dropout_p.
        window_size: see dropout_p.
        softcap: see dropout_p.
        alibi_slopes: (nheads,) or (sequences, nheads) fp32.
        deterministic: see dropout_p.
        return_attn_probs: see dropout_p.
        group: see dropout_p.
        partition: see dropout_p.
        seqlen: tokens of all ranks together; taken from `cu_seqlens` if None, except of a tensor under torch.compile,
            where every rank then has to hold the same number of tokens.

    Returns:
        out (s, nheads, headdim_v); with return_attn_probs also softmax_lse (nheads, s), and S_dmask.
    """
    try:
        options = Options.of(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )
        q, k, v = (rows_together(name, x, 3) for name, x in (("q", q), ("k", k), ("v", v)))
        if not torch.compiler.is_compiling():
            seqlen = _check_global(cu_seqlens, max_seqlen, seqlen)
        elif not isinstance(cu_seqlens, Tensor):
            seqlen = cu_seqlens[-1]
        _check_probabilities(options, group)
    except Exception as error:
        refuse(group, error)
        raise
    seed = options.draw_seed(q)
    out, lse = attention(
        q[None],
        k[None],
        v[None],
        mask=options.mask,
        cu_seqlens=cu_seqlens,
        seqlen=seqlen,
        key_seqlen=seqlen,
        group=group,
        partition=partition,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        dropout=options.dropout,
        dropout_seed=seed,
        deterministic=options.deterministic,
    )
    out, lse = out[0], lse[0]
    if not return_attn_probs:
        return out
    edges = torch.as_tensor(cu_seqlens)
    return out, lse, options.probabilities(q, k, lse, seed, (edges, edges), (max_seqlen, max_seqlen))


def ring_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    partition: str | Partition = "zigzag",
    seqlen: int | None = None,
) -> Attention:
    """`ring_flash_attn_varlen_func` with queries, keys and values in one tensor, (s, 3, nheads, headdim)."""
    return ring_flash_attn_varlen_func(
        *_unpack(qkv, 4, group),
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        partition,
        seqlen,
    )


def _unpack(qkv: Tensor, dims: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return unpack("qkv", qkv, 3, dims)
    except Exception as error:
        refuse(group, error)
        raise


def _check_probabilities(options: Options, group: Group) -> None:
    if options.return_attn_probs and options.dropout and (ranks := group_size(group)) > 1:
        raise ArgumentError(
            f"return_attn_probs=True with dropout_p={options.dropout} over {ranks} ranks; S_dmask needs all keys on "
            "one rank. Pass dropout_p=0, or call flash_attn_func on the whole sequence"
        )


def _check_global(cu_seqlens: Sequence[int] | Tensor, max_seqlen: int, seqlen: int | None) -> int:
    """Tokens of all ranks together."""
    if isinstance(cu_seqlens, Tensor) and (cu_seqlens.device.type != "cpu" or cu_seqlens.dim() != 1):
        raise ArgumentError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} on {cu_seqlens.device}; plans for several ranks are made on the "
            "CPU, pass it there, (sequences + 1,)"
        )
    edges = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if len(edges) < 2:
        raise ArgumentError(f"cu_seqlens={edges}; allowed is where each sequence begins, and the end of the last")
    if (longest := max(b - a for a, b in itertools.pairwise(edges))) > max_seqlen:
        raise ArgumentError(f"max_seqlen={max_seqlen}; the longest sequence has {longest}")
    if seqlen not in (None, edges[-1]):
        raise ArgumentError(f"seqlen={seqlen}; cu_seqlens ends at {edges[-1]}")
    return edges[-1]
