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
from ringflash.kernels.decode import Cache, Rotary, Rules, implementation

MOST_SPLITS = 128
"""Of `num_splits`."""


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
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
            and else at `cache_seqlens`. Needs `k`.
        rotary_sin: likewise; comes with `rotary_cos`.
        cache_seqlens: tokens of each sequence that are in the cache before, (batch,) int32 on q's device, or one
            number for all. None: the whole cache. With `k` they must leave room for it: checked on the CPU; on a GPU,
            which is not waited for, what does not fit is not written.
        cache_batch_idx: (batch,) int32, which entry of the cache is whose; None for 0, 1, 2 ... Not with `block_table`.
        cache_leftpad: (batch,) int32, the row at which each sequence begins; None for 0.
        block_table: (batch, most pages of a sequence) int32, which pages hold each sequence.
        softmax_scale: factor of the scores; 1 / sqrt(headdim) if None.
        causal: a query sees no key behind its place.
        window_size: (left, right): keys that a query sees before and behind its place; -1 for no bound.
        softcap: scores become softcap * tanh(score / softcap); 0 and less for none.
        rotary_interleaved: dimensions 0 and 1, 2 and 3 ... are turned together, instead of 0 and rotary_dim / 2,
            1 and rotary_dim / 2 + 1 ...
        alibi_slopes: (nheads,) or (batch, nheads) fp32: slope * |query's place - key's place| is taken from a score.
        num_splits: in how many parts each sequence's keys are shared out over a GPU, up to 128; 0 chooses. Changes
            speed and rounding, and nothing on the CPU.
        return_softmax_lse: return (out, softmax_lse).

    Returns:
        out (batch, seqlen_q, nheads, headdim of v_cache), with softmax_lse (batch, nheads, seqlen_q) fp32 if asked for.

    Raises:
        ArgumentError: an argument is not supported; raised before anything is written.
        UnsupportedError: a gradient would be needed.
    """
    _check_no_gradient(q, k_cache, v_cache, k, v)
    _check_tensors(q, k_cache, v_cache, k, v, cache_batch_idx, block_table)
    _check_indices(q, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    rows = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    _check_rotary(q, k, rotary_cos, rotary_sin, rows)
    left, right = _check_scores(q, softmax_scale, causal, window_size, alibi_slopes, num_splits)
    if k is not None and cache_seqlens is None:
        raise ArgumentError("cache_seqlens is None with k given; pass how many tokens are in the cache")
    appended = 0 if k is None else k.shape[1]
    lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    offset = 0 if lengths is not None else rows if cache_seqlens is None else cache_seqlens
    if not torch.compiler.is_compiling():
        _check_values(k_cache, lengths, offset, appended, rows, cache_batch_idx, block_table)

    q = q if q.stride(-1) == 1 else q.contiguous()
    where = lengths, offset, cache_batch_idx, block_table
    rotary = rotary_cos, rotary_sin, rotary_interleaved
    if k is not None:
        torch.ops.ringflash.append_to_cache(k, v, k_cache, v_cache, *where, *rotary)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    rules = scale, left, right, max(float(softcap), 0.0)
    out, lse = torch.ops.ringflash.attend_to_cache(
        q, k_cache, v_cache, *where, *rotary, cache_leftpad, alibi_slopes, appended, *rules, num_splits
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
    kernels = implementation(key.device, key.dtype, key_cache.shape[3], value_cache.shape[3])
    cache = Cache(key_cache, value_cache, lengths, offset, None, batch_index, block_table)
    kernels.append(key, value, cache, None if cos is None else Rotary(cos, sin, interleaved))


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
    kernels = implementation(query.device, query.dtype, key_cache.shape[3], value_cache.shape[3])
    cache = Cache(key_cache, value_cache, lengths, offset, leftpad, batch_index, block_table)
    rotary = None if cos is None else Rotary(cos, sin, interleaved)
    return kernels.attend(query, cache, Rules(scale, left, right, softcap, slopes), rotary, appended, splits)


@torch.library.register_fake("ringflash::append_to_cache")
def _(*_) -> None:  # noqa: ANN002
    return None


@torch.library.register_fake("ringflash::attend_to_cache")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_) -> tuple[Tensor, Tensor]:  # noqa: ANN002
    batch, count, heads, _ = query.shape
    out = query.new_empty(batch, count, heads, value_cache.shape[3])
    return out, query.new_empty(batch, heads, count, dtype=torch.float32)


def _refuse_vmap(*_) -> None:  # noqa: ANN002
    raise UnsupportedError(
        "flash_attn_with_kvcache does not run under torch.vmap: give the mapped dimension as the batch dimension"
    )


torch.library.register_vmap("ringflash::append_to_cache", _refuse_vmap)
torch.library.register_vmap("ringflash::attend_to_cache", _refuse_vmap)


def _check_no_gradient(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UnsupportedError(
            "flash_attn_with_kvcache has no backward, and an argument requires a gradient: call it under "
            "torch.no_grad(), or train with flash_attn_func"
        )


def _check_tensors(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    if (k is None) != (v is None):
        raise ArgumentError(f"{'k' if k is None else 'v'} is None; k and v are given together or not at all")
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache} | ({} if k is None else {"k": k, "v": v})
    for name, x in named.items():
        if x.dim() != 4:
            raise ArgumentError(f"{name} has shape {tuple(x.shape)}; allowed are four dimensions, heads the third")
        if x.dtype != q.dtype or x.device != q.device:
            raise ArgumentError(f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}; make them agree")
    if not q.dtype.is_floating_point:
        raise ArgumentError(f"q is {q.dtype}; allowed are float32, float16 and bfloat16")
    (batch, _, heads, dim), (entries, page, key_heads, _) = q.shape, k_cache.shape
    if k_cache.shape[3] != dim or v_cache.shape[:3] != k_cache.shape[:3] or key_heads == 0 or heads % key_heads:
        raise ArgumentError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)} do not go together: "
            "head dimensions of q and k_cache agree, heads of q are a multiple of theirs"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ArgumentError(f"{name} has strides {x.stride()}; its last dimension must be contiguous")
    if k is not None:
        allowed = (batch, k.shape[1], key_heads)
        if k.shape != (*allowed, dim) or v.shape != (*allowed, v_cache.shape[3]):
            raise ArgumentError(
                f"k is {tuple(k.shape)}, v {tuple(v.shape)}; allowed is {(batch, 'seqlen_new', key_heads)} and the "
                f"head dimensions of the caches, {dim} and {v_cache.shape[3]}"
            )
    if block_table is not None and cache_batch_idx is not None:
        raise ArgumentError("cache_batch_idx is given with block_table, which says already where each sequence lies")
    if block_table is not None and page == 0:
        raise ArgumentError(f"k_cache has shape {tuple(k_cache.shape)}; pages of no rows")
    if block_table is None and cache_batch_idx is None and entries < batch:
        raise ArgumentError(f"k_cache has {entries} entries for {batch} sequences; pass cache_batch_idx to share them")


def _check_indices(
    q: Tensor,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    named = {
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
    }
    for name, x in named.items():
        if x is None or (name == "cache_seqlens" and isinstance(x, int)):
            continue
        dims = 2 if name == "block_table" else 1
        if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != dims or x.shape[0] != q.shape[0]:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
            shape = f"({q.shape[0]}{', pages)' if dims == 2 else ',)'}"
            raise ArgumentError(f"{name} is {got}; allowed is int32 {shape}")
        if x.device != q.device:
            raise ArgumentError(f"{name} is on {x.device}, q on {q.device}; make them agree")


def _check_rotary(q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, rows: int) -> None:
    if (cos is None) != (sin is None):
        raise ArgumentError(f"rotary_{'cos' if cos is None else 'sin'} is None; both are given or neither")
    if cos is None:
        return
    if k is None:
        raise ArgumentError("rotary_cos is given without k; it turns new keys and the queries that come with them")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.dim() != 2 or x.shape != cos.shape or x.shape[0] < rows or not 0 < 2 * x.shape[1] <= q.shape[3]:
            raise ArgumentError(
                f"{name} has shape {tuple(x.shape)}; allowed is (seqlen_ro, rotary_dim / 2) for both, seqlen_ro at "
                f"least {rows} and rotary_dim at most {q.shape[3]}"
            )
        if x.dtype not in (q.dtype, torch.float32) or x.device != q.device:
            raise ArgumentError(f"{name} is {x.dtype} on {x.device}; allowed is {q.dtype} or float32 on {q.device}")


def _check_scores(
    q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[int | None, int | None]:
    """Bounds to the left and to the right; None for none."""
    if softmax_scale is not None and not 0 < softmax_scale < float("inf"):
        raise ArgumentError(f"softmax_scale={softmax_scale}; allowed are positive numbers, or None")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ArgumentError(f"window_size={window_size}; allowed is (left, right), each -1 for no bound, or more")
    if not 0 <= num_splits <= MOST_SPLITS:
        raise ArgumentError(f"num_splits={num_splits}; allowed are 0 to choose, and 1 to {MOST_SPLITS}")
    if alibi_slopes is not None:
        allowed = (q.shape[2],), (q.shape[0], q.shape[2])
        x = alibi_slopes
        if x.shape not in allowed or x.dtype != torch.float32 or x.device != q.device:
            raise ArgumentError(
                f"alibi_slopes is {x.dtype} {tuple(x.shape)} on {x.device}; allowed is float32 of {allowed[0]} or "
                f"{allowed[1]} on {q.device}"
            )
    left, right = (None if x == -1 else int(x) for x in window_size)
    return left, 0 if causal else right


def _check_values(
    k_cache: Tensor,
    lengths: Tensor | None,
    offset: int,
    appended: int,
    rows: int,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """What numbers on the host allow to check."""
    on_host = k_cache.device.type == "cpu"
    if lengths is None or (on_host and lengths.numel()):
        least, most = (offset, offset) if lengths is None else (int(x) for x in lengths.aminmax())
        if least < 0 or most + appended > rows:
            raise ArgumentError(
                f"cache_seqlens from {least} to {most} and {appended} new tokens; allowed are the {rows} rows "
                "that the cache has for a sequence"
            )
    entries = k_cache.shape[0]
    if on_host and cache_batch_idx is not None and cache_batch_idx.numel():
        least, most = (int(x) for x in cache_batch_idx.aminmax())
        if least < 0 or most >= entries:
            raise ArgumentError(f"cache_batch_idx from {least} to {most}; allowed is 0 to {entries - 1}")
    if on_host and block_table is not None and block_table.numel():
        used = torch.full((block_table.shape[0],), offset) if lengths is None else lengths
        pages = torch.arange(block_table.shape[1]) * k_cache.shape[1] < (used + appended)[:, None]
        if bool((((block_table < 0) | (block_table >= entries)) & pages).any()):
            raise ArgumentError(f"block_table names pages that are not there; allowed is 0 to {entries - 1}")
