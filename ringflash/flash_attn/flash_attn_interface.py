"""flash-attn's functions on these kernels: same names, same arguments in the same order, same meaning.

    from ringflash import flash_attn_func                   # instead of: from flash_attn import flash_attn_func
    out = flash_attn_func(q, k, v, causal=True, window_size=(1023, 0))

They run on one device and never communicate; `ringflash.ring_flash_attn` has the same over the ranks of a group.
Arguments that all of them share:

    dropout_p           probability of dropping a pair; 0 outside of training. Seeded by `torch.manual_seed`.
    softmax_scale       factor of the scores; 1 / sqrt(headdim) if None.
    causal              a query sees no key behind it.
    window_size         (left, right): keys that a query sees before and behind its place; -1 for no bound.
    softcap             scores become softcap * tanh(score / softcap); 0 and less for none.
    alibi_slopes        (nheads,) or (batch, nheads) fp32: slope * |query's place - key's place| is taken from a score.
                        They get no gradient.
    deterministic       gradients repeat bit for bit.
    return_attn_probs   return (out, softmax_lse, S_dmask) instead of out. softmax_lse is (batch, nheads, seqlen_q)
                        fp32, or (nheads, total_q) if packed, and has a gradient. S_dmask is None without dropout; with
                        it the probabilities (batch, nheads, seqlen_q, seqlen_k), negative for pairs that were dropped.

Places are counted from the end where queries and keys differ in length: the last query stands at the last key. A query
that sees no key gets 0, a log-sum-exp of -inf, and gives no gradients. nheads is a multiple of nheads_k. fp16, bf16
and fp32; the value's head dimension may differ from the key's. Wrong arguments raise `ringflash.ArgumentError`, before
anything is computed.

For wrappers that pass everything on: None is what these arguments are if they are not passed, a bound of the window may
be None, and max_seqlen may be None or a tensor, also in compiled code, as next to nothing depends on it.

What flash-attn does not take and this does: any head dimension, softcap with dropout, gradients with paged keys,
pages of any size, and boundaries on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import (
    Attention,
    Longest,
    Options,
    Window,
    attend_batch,
    check_boundaries,
    longest_needed,
    name_of_longest,
    rows_together,
    unpack,
)
from ringflash.flash_attn.kvcache import flash_attn_with_kvcache
from ringflash.functional import attention, check_types
from ringflash.parallel.mesh import ONE_DEVICE

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """Attention of a batch of sequences of one length; arguments are the module's.

    Shapes:
        q: (batch, seqlen_q, nheads, headdim).
        k: (batch, seqlen_k, nheads_k, headdim).
        v: (batch, seqlen_k, nheads_k, headdim_v).

    Returns:
        out (batch, seqlen_q, nheads, headdim_v).
    """
    options = Options.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return attend_batch(q, k, v, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_func` with keys and values in one tensor.

    Shapes:
        q: (batch, seqlen_q, nheads, headdim).
        kv: (batch, seqlen_k, 2, nheads_k, headdim).
    """
    options = Options.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return attend_batch(q, *unpack("kv", kv, 2, 5), options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_func` with queries, keys and values in one tensor.

    Shapes:
        qkv: (batch, seqlen, 3, nheads, headdim).
    """
    options = Options.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return attend_batch(*unpack("qkv", qkv, 3, 5), options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Longest,
    max_seqlen_k: Longest,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attention:
    """Attention of sequences of any lengths, laid end to end; arguments not listed are the module's.

    Boundaries on the queries' device stay there. Queries behind the last sequence get 0, as if they saw no key; keys
    and values there are not seen, but must be finite.

    Own arguments:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim); with `block_table` (pages, page_size, nheads_k, headdim).
        v: (total_k, nheads_k, headdim_v), or pages as `k`.
        cu_seqlens_q: (batch + 1,) int32, where each sequence of q begins, and the end; on q's device or on the CPU.
        cu_seqlens_k: likewise for k. A sequence may be empty.
        max_seqlen_q: length of the longest sequence of q: an integer, a tensor of one, or None. Sizes S_dmask and is
            checked against `cu_seqlens_q` on the CPU; nothing else depends on it.
        max_seqlen_k: likewise for k; also how many keys of each sequence are gathered from pages.
        block_table: (batch, most pages of a sequence) int32, which pages hold each sequence. They are copied to lie
            end to end. That they hold all keys is checked where boundaries are on the CPU, and which pages there are
            where the table is; on a GPU, which is not waited for, rows are then repeated.

    Returns:
        out (total_q, nheads, headdim_v).
    """
    options = Options.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    if block_table is not None:
        check_boundaries("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, q, None)
        longest = longest_needed("max_seqlen_k", max_seqlen_k, "block_table")
        k = _gather_pages("k", k, block_table, cu_seqlens_k, longest)
        v = _gather_pages("v", v, block_table, cu_seqlens_k, longest)
    return _packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Longest,
    max_seqlen_k: Longest,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_varlen_func` with keys and values in one tensor.

    Shapes:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim).
    """
    options = Options.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _packed(
        q, *unpack("kv", kv, 2, 4), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), options
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Longest,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor.

    Shapes:
        qkv: (total, 3, nheads, headdim).
        cu_seqlens: (batch + 1,) int32, where each sequence begins, and the end.
        max_seqlen: length of the longest sequence, as `max_seqlen_q` there.
    """
    options = Options.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    names = ("cu_seqlens", "cu_seqlens")
    return _packed(*unpack("qkv", qkv, 3, 4), (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), options, names)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: tuple[Tensor, Tensor],
    longest: tuple[Longest, Longest],
    options: Options,
    names: tuple[str, str] = ("cu_seqlens_q", "cu_seqlens_k"),
) -> Attention:
    q, k, v = (rows_together(name, x, 3) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x, longest_of, total in zip(names, boundaries, longest, (q.shape[0], k.shape[0]), strict=True):
        check_boundaries(name, x, longest_of, q, total)
    sizes = 0, 0
    if options.dropout and options.return_attn_probs:
        of_q, of_k = map(name_of_longest, names)
        sizes = longest_needed(of_q, longest[0], "S_dmask"), longest_needed(of_k, longest[1], "S_dmask")
    cu_seqlens_q, cu_seqlens_k = boundaries
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.device != cu_seqlens_k.device:
        raise ArgumentError(
            f"cu_seqlens_q is {tuple(cu_seqlens_q.shape)} on {cu_seqlens_q.device}, cu_seqlens_k "
            f"{tuple(cu_seqlens_k.shape)} on {cu_seqlens_k.device}; make them agree"
        )
    batch, seed = cu_seqlens_q.shape[0] - 1, options.draw_seed(q)
    # Tokens behind the last sequence, which a buffer of fixed size has, make two more documents: first queries without
    # keys, then keys without queries. So the ends need not be read here.
    queries, keys = (x.new_full((1,), tokens) for x, tokens in zip(boundaries, (q.shape[0], k.shape[0]), strict=True))
    slopes = options.alibi_slopes
    if slopes is not None and slopes.dim() == 2:
        if slopes.shape[0] != batch:
            raise ArgumentError(f"alibi_slopes has shape {tuple(slopes.shape)} for {batch} sequences; make them agree")
        slopes = pad(slopes, (0, 0, 0, 2))
    out, lse = attention(
        q[None],
        k[None],
        v[None],
        mask=options.mask,
        cu_seqlens=torch.cat([cu_seqlens_k, cu_seqlens_k[-1:], keys]),
        query_cu_seqlens=torch.cat([cu_seqlens_q, queries, queries]),
        group=ONE_DEVICE,
        seqlen=q.shape[0],
        key_seqlen=k.shape[0],
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=slopes,
        dropout=options.dropout,
        dropout_seed=seed,
        deterministic=options.deterministic,
    )
    out, lse = out[0], lse[0]
    return (out, lse, options.probabilities(q, k, lse, seed, boundaries, sizes)) if options.return_attn_probs else out


def _gather_pages(name: str, pages: Tensor, block_table: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Sequences that lie in pages, end to end: (batch * longest, heads, dim); rows behind the last repeat the first.

    Args:
        name: argument that holds the pages.
        pages: (pages, page_size, heads, dim).
        block_table: (batch, most pages of a sequence) int32.
        cu_seqlens: (batch + 1,), lengths of the sequences.
        longest: no sequence is longer.
    """
    check_types({name: pages, "block_table": block_table})
    if pages.dim() != 4:
        raise ArgumentError(
            f"{name} has shape {tuple(pages.shape)}; with block_table it is (pages, page_size, nheads_k, headdim)"
        )
    batch = cu_seqlens.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; allowed is int32 ({batch}, pages)"
        )
    page_size, width = pages.shape[1], block_table.shape[1]
    if not torch.compiler.is_compiling():
        _check_pages(pages.shape[0], page_size, block_table, cu_seqlens)
    if not width or not page_size:
        return pages.new_empty(0, *pages.shape[2:])
    edges = cu_seqlens.to(pages.device, torch.int64)
    row = torch.arange(batch * min(longest, width * page_size), device=pages.device)
    row = torch.where(row < edges[-1], row, 0)  # so that no row holds what was never written, which may be NaN
    sequence = (torch.searchsorted(edges, row, right=True) - 1).clamp(max=batch - 1)
    offset = (row - edges[sequence]).clamp(max=width * page_size - 1)
    # Entries behind a sequence's end may be anything, and are often -1.
    page = block_table[sequence, offset // page_size].clamp(0, pages.shape[0] - 1)
    return pages.flatten(0, 1)[page * page_size + offset % page_size]


def _check_pages(count: int, page_size: int, block_table: Tensor, cu_seqlens: Tensor) -> None:
    """What numbers on the host allow to check."""
    if cu_seqlens.device.type != "cpu":
        return
    lengths, rows = cu_seqlens.diff(), block_table.shape[1] * page_size
    if lengths.max() > rows:
        raise ArgumentError(
            f"cu_seqlens_k has a sequence of {lengths.max()} keys; block_table {tuple(block_table.shape)} with pages "
            f"of {page_size} rows holds {rows} of each"
        )
    if block_table.device.type == "cpu":
        read = torch.arange(block_table.shape[1]) * page_size < lengths[:, None]
        if bool((((block_table < 0) | (block_table >= count)) & read).any()):
            raise ArgumentError(f"block_table names pages that are not there; allowed is 0 to {count - 1}")
