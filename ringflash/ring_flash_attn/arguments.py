"""The arguments of ring-flash-attn's functions, checked and put in the words of `ringflash.functional.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import Attention, Options, check_boundaries, rows_together, unpack
from ringflash.functional import attention
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import Group, group_size
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.ring_flash_attn.boundaries import on_host

Packed = tuple[Tensor] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""(qkv,), (q, kv) or (q, k, v)."""

Shared = tuple[float, float | None, bool, tuple[int, int], Tensor | None, bool, bool]
"""What all functions take: dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic and
return_attn_probs."""


def attend_batch(tensors: Packed, partition: str, shared: Shared, group: Group) -> Attention:
    """Attention of a batch of sequences of one length, (batch, s, nheads, headdim)."""
    try:
        options = options_of(shared)
        q, k, v = separate(tensors, 4)
        check_lengths(q, k, options, contiguous=partition == "contiguous")
        if partition == "zigzag" and q.shape[1] % 2:
            raise ArgumentError(f"q has {q.shape[1]} tokens; allowed is an even number, for two pieces of equal length")
    except Exception as error:
        refuse(group, error)
        raise
    out, lse = attend(q, k, v, options, group, partition)
    return (out, lse, None) if options.return_attn_probs else out


def attend_packed(
    tensors: Packed, cu_seqlens: Tensor, max_seqlen: int, partition: str, shared: Shared, group: Group
) -> Attention:
    """Attention of packed sequences, (total, nheads, headdim), each of which is divided over all ranks."""
    try:
        options = options_of(shared)
        q, k, v = separate(tensors, 3)
        if k.shape[0] != q.shape[0]:
            raise ArgumentError(f"q has {q.shape[0]} tokens and k {k.shape[0]}; allowed is the same number")
        boundaries = _of_all_ranks(cu_seqlens, max_seqlen, q, group_size(group), partition)
    except Exception as error:
        refuse(group, error)
        raise
    out, lse = attend(q[None], k[None], v[None], options, group, partition, cu_seqlens=boundaries)
    return (out[0], lse[0], None) if options.return_attn_probs else out[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, group: Group, partition: str | Partition, **others: Any
) -> tuple[Tensor, Tensor]:
    """`ringflash.functional.attention` by these options."""
    return attention(
        q,
        k,
        v,
        mask=options.mask,
        group=group,
        partition=partition,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        dropout=options.dropout,
        deterministic=options.deterministic,
        **others,
    )


def options_of(shared: Shared, softcap: float = 0.0) -> Options:
    """The checked options of a call."""
    dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs = shared
    numbers = dropout_p, softmax_scale, causal, window_size, softcap
    return Options.of(*numbers, alibi_slopes, deterministic, return_attn_probs)


def separate(tensors: Packed, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each of so many dimensions."""
    if len(tensors) == 1:
        tensors = unpack("qkv", tensors[0], 3, dims + 1)
    elif len(tensors) == 2:
        tensors = (tensors[0], *unpack("kv", tensors[1], 2, dims + 1))
    q, k, v = tensors
    return rows_together("q", q, dims), rows_together("k", k, dims), rows_together("v", v, dims)


def check_lengths(q: Tensor, k: Tensor, options: Options, contiguous: bool) -> None:
    """Raise ArgumentError where keys of another length would stand in no known place to the queries."""
    if k.shape[1] != q.shape[1] and not (contiguous and options.mask == Mask.bidirectional()):
        raise ArgumentError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]}; allowed is the same number, and any in one piece for each "
            "rank without causal and window_size"
        )


def _of_all_ranks(cu_seqlens: Tensor, max_seqlen: int, q: Tensor, ranks: int, partition: str) -> Tensor:
    """Boundaries over the tokens of all ranks, from those over this rank's."""
    if ranks == 1:
        check_boundaries("cu_seqlens", cu_seqlens, max_seqlen, q, q.shape[0])
        return cu_seqlens
    check_boundaries("cu_seqlens", cu_seqlens, max_seqlen, q, None)
    own = on_host(cu_seqlens).long()
    if not torch.compiler.is_compiling():
        check_boundaries("cu_seqlens", own, max_seqlen, q, None)
        if own[-1] > q.shape[0]:
            raise ArgumentError(
                f"cu_seqlens ends at {int(own[-1])}, and this rank has {q.shape[0]} tokens of {ranks} ranks; allowed "
                f"are boundaries of this rank's tokens, which are those of the whole sequences divided by {ranks}"
            )
        if partition.startswith("zigzag") and (own % 2).any():
            raise ArgumentError(
                f"cu_seqlens={own.tolist()[:6]}...; allowed are even numbers, for two pieces of equal length of each "
                "sequence"
            )
    return own * ranks
