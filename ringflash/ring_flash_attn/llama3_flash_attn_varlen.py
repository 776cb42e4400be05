"""Packed sequences cut into one piece for each rank all together, wherever a sequence begins.

    cu_seqlens_q, cu_seqlens_k, max_q, max_k, k_slice = llama3_flash_attn_prepare_cu_seqlens(
        cu_seqlens, causal=True, rank=rank, world_size=ranks
    )
    q, k, v = (x.chunk(ranks)[rank] for x in (q, k, v))                    # (total, nheads, headdim)
    out = llama3_flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, heads_k_stride=1, local_k_slice=k_slice, causal=True
    )

These five values say what one rank's queries see. A ring's plan also has to say which of its keys the others see, so
`local_k_slice` carries the boundaries of all ranks; a slice of other origin is refused.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import Attention
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import Group, place_in
from ringflash.parallel.positions.documents import boundaries_of, longest
from ringflash.ring_flash_attn.arguments import Packed, Shared, attend, options_of, separate
from ringflash.ring_flash_attn.boundaries import on_host


@dataclass(frozen=True)
class Prepared:
    """What the values of `llama3_flash_attn_prepare_cu_seqlens` were made from.

    Attributes:
        cu_seqlens: boundaries over the tokens of all ranks.
        causal: whether they serve a causal mask.
        rank: whose they are.
        ranks: how many there are.
        sequences: how many this rank has a part of.
    """

    cu_seqlens: tuple[int, ...]
    causal: bool
    rank: int
    ranks: int
    sequences: int

    def check_tokens(self, name: str, tokens: int) -> None:
        """Raise ArgumentError unless a rank's piece has so many tokens."""
        if tokens * self.ranks != self.cu_seqlens[-1]:
            raise ArgumentError(
                f"{name} has {tokens} tokens; cu_seqlens ends at {self.cu_seqlens[-1]}, of which each of {self.ranks} "
                f"ranks holds {self.cu_seqlens[-1] // self.ranks}"
            )


class _Start(int):
    """Start of a slice of keys, which knows what it was made from.

    The tensors among the five values may be moved to a device, or come from a DataLoader's worker as copies. A slice
    stays what it is.
    """

    prepared: Prepared


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What `llama3_flash_attn_varlen_func` takes, from the boundaries of all ranks.

    Args:
        cu_seqlens: (sequences + 1,) int32 or int64, where each sequence begins among the tokens of all ranks, and the
            end, a multiple of world_size. On a device the host waits for it once for each tensor.
        causal: whether the mask is to be causal.
        rank: this rank in its group.
        world_size: number of ranks.

    Returns:
        cu_seqlens_q, where the sequences that this rank has a part of begin among its tokens; cu_seqlens_k, where they
        begin in the slice of keys; the longest of both; and the slice of all ranks' keys that this rank's queries see,
        or, without a causal mask, all of their sequences.

    Raises:
        ArgumentError: by name and value.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ArgumentError(f"cu_seqlens={cu_seqlens}; allowed is a one-dimensional int32 tensor")
    edges, _ = boundaries_of(on_host(cu_seqlens).tolist(), None)
    if not 0 <= rank < world_size:
        raise ArgumentError(f"rank={rank}, world_size={world_size}; allowed is 0 <= rank < world_size")
    if edges[-1] == 0 or edges[-1] % world_size:
        raise ArgumentError(f"cu_seqlens ends at {edges[-1]}; allowed are multiples of world_size={world_size}")
    tokens = edges[-1] // world_size
    begin, end = rank * tokens, (rank + 1) * tokens
    first, last = bisect_left(edges, begin), bisect_left(edges, end)
    first -= edges[first] != begin
    start, stop = edges[first], end if causal else edges[last]
    inner = edges[first + 1 : last]
    of_queries = [0, *(x - begin for x in inner), tokens]
    of_keys = [0, *(x - start for x in inner), stop - start]
    known = _Start(start)
    known.prepared = Prepared(edges, causal, rank, world_size, last - first)
    kind = {"dtype": cu_seqlens.dtype, "device": cu_seqlens.device}
    of_both = torch.tensor(of_queries, **kind), torch.tensor(of_keys, **kind)
    return *of_both, longest(tuple(of_queries)), longest(tuple(of_keys)), slice(known, stop)


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`flash_attn_varlen_func` of packed sequences whose rank r holds piece r of `ranks` equal pieces of all together.

    Args:
        q: (total, nheads, headdim), this rank's piece.
        k: (total, nheads_k, headdim).
        v: (total, nheads_k, headdim_v).
        cu_seqlens_q: from `llama3_flash_attn_prepare_cu_seqlens`, as are all down to max_seqlen_k and local_k_slice.
            Values of these tensors are not read: the slice says what they do. To torch.compile it is a constant, and
            code is compiled anew for another one.
        cu_seqlens_k: see cu_seqlens_q.
        max_seqlen_q: see cu_seqlens_q.
        max_seqlen_k: see cu_seqlens_q.
        heads_k_stride: a divisor of nheads_k. ring-flash-attn gathers keys of all ranks, so many heads at a time; here
            keys travel round the ring, and only as far as somebody sees them, all heads together.
        local_k_slice: see cu_seqlens_q.
        dropout_p: see `ring_flash_attn_func`; so are those down to window_size.
        softmax_scale: see dropout_p.
        causal: see dropout_p; what `llama3_flash_attn_prepare_cu_seqlens` was given.
        window_size: see dropout_p.
        alibi_slopes: (nheads,) or (sequences of all ranks, nheads) fp32, for distances in the whole sequence.
        deterministic: see `ring_flash_attn_func`; so are those down to group.
        return_attn_probs: see deterministic.
        group: see deterministic.

    Returns:
        out (total, nheads, headdim_v); with return_attn_probs (out, softmax_lse (nheads, total) fp32, None).

    Raises:
        ArgumentError: see `ring_flash_attn_func`; also what was made for another rank, mask or number of tokens.
        RankMismatchError: see `ring_flash_attn_func`.
    """
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return _attend((q, k, v), cu_seqlens_q, heads_k_stride, local_k_slice, shared, group)


def llama3_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`llama3_flash_attn_varlen_func` with keys and values in one tensor, (total, 2, nheads_k, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return _attend((q, kv), cu_seqlens_q, heads_k_stride, local_k_slice, shared, group)


def llama3_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Attention:
    """`llama3_flash_attn_varlen_func` with queries, keys and values in one tensor, (total, 3, nheads, headdim)."""
    shared = dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs
    return _attend((qkv,), cu_seqlens_q, heads_k_stride, local_k_slice, shared, group)


def _attend(
    tensors: Packed,
    cu_seqlens_q: Tensor,
    heads_k_stride: int,
    local_k_slice: slice,
    shared: Shared,
    group: Group,
) -> Attention:
    try:
        options = options_of(shared)
        q, k, v = separate(tensors, 3)
        prepared = prepared_of(local_k_slice, group)
        if shared[2] != prepared.causal:
            raise ArgumentError(f"causal={shared[2]}; local_k_slice was made for causal={prepared.causal}")
        prepared.check_tokens("q", q.shape[0])
        prepared.check_tokens("k", k.shape[0])
        if len(cu_seqlens_q) != prepared.sequences + 1:
            raise ArgumentError(
                f"cu_seqlens_q has {len(cu_seqlens_q)} entries; local_k_slice was made with one of "
                f"{prepared.sequences + 1}"
            )
        if heads_k_stride < 1 or k.shape[1] % heads_k_stride:
            raise ArgumentError(f"heads_k_stride={heads_k_stride}; allowed are divisors of the {k.shape[1]} heads of k")
    except Exception as error:
        refuse(group, error)
        raise
    boundaries = prepared.cu_seqlens
    out, lse = attend(q[None], k[None], v[None], options, group, "contiguous", cu_seqlens=boundaries)
    return (out[0], lse[0], None) if options.return_attn_probs else out[0]


def prepared_of(local_k_slice: slice, group: Group) -> Prepared:
    """What a slice was made from, in the group that it was made for."""
    known = local_k_slice.start if isinstance(local_k_slice, slice) else None
    if not isinstance(known, _Start):
        raise ArgumentError(
            f"local_k_slice={local_k_slice}; allowed is the slice that llama3_flash_attn_prepare_cu_seqlens returned, "
            "which carries the boundaries of all ranks"
        )
    prepared, place = known.prepared, place_in(group)
    if place != (prepared.rank, prepared.ranks):
        raise ArgumentError(
            f"local_k_slice was made for rank {prepared.rank} of {prepared.ranks}; this process is rank {place[0]} of "
            f"{place[1]} in the group"
        )
    return prepared
