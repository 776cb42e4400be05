"""flash-attn's `flash_attn_with_kvcache`: attention of new tokens to a cache, which takes their keys and values first.

    from ringflash import flash_attn_with_kvcache
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True)
    cache_seqlens += k.shape[1]

It runs as two operators, `ringflash::append_to_cache` and `ringflash::attend_to_cache`, opaque to torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError, UnsupportedError
from ringflash.flash_attn.arguments import Window
from ringflash.flash_attn.kvcache_arguments import (
    check_indices,
    check_no_gradient,
    check_rotary,
    check_scores,
    check_tensors,
    check_values,
)
from ringflash.functional import check_types
from ringflash.kernels.decode import Cache, Rotary, Rules
from ringflash.kernels.devices import on_device_without_autocast
from ringflash.kernels.overrun import raise_if_overrun
from ringflash.kernels.select import select_decoding
from ringflash.kernels.torch_private import mapped
from ringflash.parallel.positions.integers import check_flag


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence's queries to its part of the cache, to which k and v are appended first.

    Places are rows of the cache and are counted from the end: the last query stands at the last key, appended ones
    included. A query that sees no key gets 0 and a log-sum-exp of -inf. There is no gradient. Nothing waits for a
    device, so CUDA graphs can capture a step.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16 or fp32; so are the caches, k and v.
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim); with `block_table` pages of any size, (num_blocks,
            page_block_size, nheads_k, headdim). nheads is a multiple of nheads_k. Only q, k and v may have a last
            dimension that is not contiguous.
        v_cache: the same; its head dimension may differ.
        k: (batch, seqlen_new, nheads_k, headdim), written to `k_cache` in place, at the rows from `cache_seqlens`.
        v: likewise for `v_cache`; comes with `k`.
        rotary_cos: (seqlen_ro, rotary_dim / 2) in q's dtype or fp32, seqlen_ro at least the rows of a sequence's
            cache. Turns k at the rows it is written to, and q at `cache_seqlens` + i if `causal` or with a window,
            and else at `cache_seqlens`. Needs `k`. Queries behind seqlen_ro are refused where the host knows
            `cache_seqlens`, as a number or on the CPU; elsewhere what they give means nothing.
        rotary_sin: likewise; comes with `rotary_cos`.
        cache_seqlens: tokens of each sequence that are in the cache before, (batch,) int32 on q's device, or one
            number for all. None: the whole cache. With `k` they must leave room for it, in the cache or in the pages
            that `block_table` names. A GPU is not waited for: what does not fit is not written, and the next call on
            that GPU raises. Where only a CUDA graph is replayed, `ringflash.kernels.overrun.raise_if_overrun` asks.
        cache_batch_idx: (batch,) int32, which entry of the cache is whose; None for 0, 1, 2 ... Not with `block_table`.
        cache_leftpad: (batch,) int32, the row at which each sequence begins; None for 0.
        block_table: (batch, most pages of a sequence) int32, which pages hold each sequence.
        softmax_scale: factor of the scores; 1 / sqrt(headdim) if None.
        causal: a query sees no key behind its place.
        window_size: (left, right): keys that a query sees before and behind its place; -1 or None for no bound.
        softcap: scores become softcap * tanh(score / softcap); 0 and less, or None, for none.
        rotary_interleaved: dimensions 0 and 1, 2 and 3 ... are turned together, instead of 0 and rotary_dim / 2,
            1 and rotary_dim / 2 + 1 ...
        alibi_slopes: (nheads,) or (batch, nheads) fp32: slope * |query's place - key's place| is taken from a score.
        num_splits: in how many parts each sequence's keys are shared out over a GPU, up to 128; 0 or None chooses.
            Changes speed and rounding, and nothing on the CPU.
        return_softmax_lse: return (out, softmax_lse).

    Returns:
        out (batch, seqlen_q, nheads, headdim of v_cache), with softmax_lse (batch, nheads, seqlen_q) fp32 if asked for.

    Raises:
        ArgumentError: an argument is not supported; raised before anything is written. Or lengths on a GPU went beyond
            the cache in an earlier call: raised once, by the first call that comes when the GPU has found out.
        UnsupportedError: a gradient would be needed.
    """
    others = {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "alibi_slopes": alibi_slopes}
    check_types({"q": q, "k_cache": k_cache, "v_cache": v_cache}, others)
    check_flag("rotary_interleaved", rotary_interleaved)
    check_flag("return_softmax_lse", return_softmax_lse)
    num_splits = 0 if num_splits is None else num_splits
    check_no_gradient(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes)
    if not torch.compiler.is_compiling() and mapped(
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, alibi_slopes
    ):
        raise UnsupportedError(NO_VMAP)
    check_tensors(q, k_cache, v_cache, k, v, cache_batch_idx, block_table)
    check_indices(q, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    rows = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    check_rotary(q, k, rotary_cos, rotary_sin, rows)
    rules = check_scores(q, softmax_scale, causal, window_size, softcap, alibi_slopes, num_splits)
    if k is not None and cache_seqlens is None:
        raise ArgumentError("cache_seqlens is None with k given; pass how many tokens are in the cache")
    appended = 0 if k is None else k.shape[1]
    lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    offset = 0 if isinstance(cache_seqlens, Tensor) else rows if cache_seqlens is None else cache_seqlens
    if not torch.compiler.is_compiling():
        turned, places = (0, 0) if rotary_cos is None or rules[:2] == (None, None) else (q.shape[1], len(rotary_cos))
        check_values(
            k_cache, lengths, offset, appended, rows, cache_batch_idx, cache_leftpad, block_table, turned, places
        )

    q = q if q.stride(-1) == 1 else q.contiguous()
    where = lengths, offset, cache_batch_idx, block_table
    rotary = rotary_cos, rotary_sin, bool(rotary_interleaved)
    if k is not None:
        torch.ops.ringflash.append_to_cache(k, v, k_cache, v_cache, *where, *rotary)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = torch.ops.ringflash.attend_to_cache(
        q, k_cache, v_cache, *where, *rotary, cache_leftpad, alibi_slopes, appended, scale, *rules, num_splits
    )
    return (out, lse) if return_softmax_lse else out


# Operators. torch.library.custom_op would do the same at several times the cost of a call, which is all there is to
# hide behind when one token is decoded.

_WHERE = "Tensor? lengths, SymInt offset, Tensor? batch_index, Tensor? block_table"
_ROTARY = "Tensor? cos, Tensor? sin, bool interleaved"
torch.library.define(
    "ringflash::append_to_cache",
    f"(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, {_WHERE}, {_ROTARY}) -> ()",
)
torch.library.define(
    "ringflash::attend_to_cache",
    f"(Tensor query, Tensor key_cache, Tensor value_cache, {_WHERE}, {_ROTARY}, Tensor? leftpad, Tensor? slopes, "
    "SymInt appended, float scale, SymInt? left, SymInt? right, float softcap, int splits) -> (Tensor, Tensor)",
)


@torch.library.impl("ringflash::append_to_cache", "CompositeExplicitAutograd")
def _append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor | None,
    offset: int,
    batch_index: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    raise_if_overrun(key.device)
    kernels = select_decoding(key.device, key.dtype, key_cache.shape[3], value_cache.shape[3])
    cache = Cache(key_cache, value_cache, lengths, offset, None, batch_index, block_table)
    with on_device_without_autocast(key):
        kernels.append(key, value, cache, None if cos is None or sin is None else Rotary(cos, sin, interleaved))


@torch.library.impl("ringflash::attend_to_cache", "CompositeExplicitAutograd")
def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor | None,
    offset: int,
    batch_index: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    leftpad: Tensor | None,
    slopes: Tensor | None,
    appended: int,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    splits: int,
) -> tuple[Tensor, Tensor]:
    if not appended:  # else the same call has asked before it appended, and might hear of itself
        raise_if_overrun(query.device)
    kernels = select_decoding(query.device, query.dtype, key_cache.shape[3], value_cache.shape[3])
    cache = Cache(key_cache, value_cache, lengths, offset, leftpad, batch_index, block_table)
    rotary = None if cos is None or sin is None else Rotary(cos, sin, interleaved)
    with on_device_without_autocast(query):
        return kernels.attend(query, cache, Rules(scale, left, right, softcap, slopes), rotary, appended, splits)


@torch.library.register_fake("ringflash::append_to_cache")
def _(*_) -> None:  # noqa: ANN002
    return None


@torch.library.register_fake("ringflash::attend_to_cache")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_) -> tuple[Tensor, Tensor]:  # noqa: ANN002
    batch, count, heads, _ = query.shape
    out = query.new_empty(batch, count, heads, value_cache.shape[3])
    return out, query.new_empty(batch, heads, count, dtype=torch.float32)


NO_VMAP = "flash_attn_with_kvcache does not run under torch.vmap: give the mapped dimension as the batch dimension"


def _refuse_vmap(*_) -> None:  # noqa: ANN002
    raise UnsupportedError(NO_VMAP)


torch.library.register_vmap("ringflash::append_to_cache", _refuse_vmap)
torch.library.register_vmap("ringflash::attend_to_cache", _refuse_vmap)
