"""Checks of the arguments of `flash_attn_with_kvcache`, by the names that it gives them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ringflash.errors import ArgumentError, UnsupportedError
from ringflash.flash_attn.arguments import Window, score_rules
from ringflash.kernels.select import DTYPES

MOST_SPLITS = 128
"""Of `num_splits`."""


def check_no_gradient(*tensors: Tensor | None) -> None:
    """Raise UnsupportedError where a gradient would be lost."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UnsupportedError(
            "flash_attn_with_kvcache has no backward, and an argument requires a gradient: call it under "
            "torch.no_grad(), or train with flash_attn_func"
        )
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedError("flash_attn_with_kvcache has no forward-mode derivative (torch.func.jvp)")


def check_tensors(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Shapes, dtypes and layouts of queries, caches and new tokens."""
    if (k is None) != (v is None):
        raise ArgumentError(f"{'k' if k is None else 'v'} is None; k and v are given together or not at all")
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache} | ({} if k is None or v is None else {"k": k, "v": v})
    for name, x in named.items():
        if x.dim() != 4:
            raise ArgumentError(f"{name} has shape {tuple(x.shape)}; allowed are four dimensions, heads the third")
        if x.dtype != q.dtype or x.device != q.device:
            raise ArgumentError(f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}; make them agree")
    if q.dtype not in DTYPES:
        raise ArgumentError(f"q is {q.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    (batch, _, heads, dim), (entries, page, key_heads, _) = q.shape, k_cache.shape
    if k_cache.shape[3] != dim or v_cache.shape[:3] != k_cache.shape[:3] or key_heads == 0 or heads % key_heads:
        raise ArgumentError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)} do not go together: "
            "head dimensions of q and k_cache agree, heads of q are a multiple of theirs"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ArgumentError(f"{name} has strides {x.stride()}; its last dimension must be contiguous")
        if k is not None and any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
            raise ArgumentError(f"{name} is expanded, strides {x.stride()}; what is appended needs a place of its own")
    if k is not None and v is not None:
        allowed = (batch, k.shape[1], key_heads)
        if k.shape != (*allowed, dim) or v.shape != (*allowed, v_cache.shape[3]):
            raise ArgumentError(
                f"k is {tuple(k.shape)}, v {tuple(v.shape)}; allowed is {(batch, 'seqlen_new', key_heads)} and the "
                f"head dimensions of the caches, {dim} and {v_cache.shape[3]}"
            )
    if block_table is not None and cache_batch_idx is not None:
        raise ArgumentError("cache_batch_idx is given with block_table, which says already where each sequence lies")
    if block_table is not None and 0 in (entries, page):
        raise ArgumentError(f"k_cache has shape {tuple(k_cache.shape)}; allowed are 1 page and more, of 1 row and more")
    if block_table is None and cache_batch_idx is None and entries < batch:
        raise ArgumentError(f"k_cache has {entries} entries for {batch} sequences; pass cache_batch_idx to share them")


def check_indices(
    q: Tensor,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """The int32 tensors that say where each sequence lies."""
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
            number = "a number, or " if name == "cache_seqlens" else ""
            raise ArgumentError(f"{name} is {got}; allowed is {number}int32 {shape}")
        if x.device != q.device:
            raise ArgumentError(f"{name} is on {x.device}, q on {q.device}; make them agree")


def check_rotary(q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, rows: int) -> None:
    """The tables of the rotary embedding, for `rows` rows of a sequence."""
    if (cos is None) != (sin is None):
        raise ArgumentError(f"rotary_{'cos' if cos is None else 'sin'} is None; both are given or neither")
    if cos is None or sin is None:
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


def check_scores(
    q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[int | None, int | None, float]:
    """Check how scores are made; see `score_rules`."""
    if not isinstance(num_splits, int) or not 0 <= num_splits <= MOST_SPLITS:
        raise ArgumentError(f"num_splits={num_splits}; allowed are 0 to choose, and 1 to {MOST_SPLITS}")
    if alibi_slopes is not None:
        allowed = (q.shape[2],), (q.shape[0], q.shape[2])
        x = alibi_slopes
        if x.shape not in allowed or x.dtype != torch.float32 or x.device != q.device:
            raise ArgumentError(
                f"alibi_slopes is {x.dtype} {tuple(x.shape)} on {x.device}; allowed is float32 of {allowed[0]} or "
                f"{allowed[1]} on {q.device}"
            )
    return score_rules(softmax_scale, causal, window_size, softcap)


def check_values(
    k_cache: Tensor,
    lengths: Tensor | None,
    offset: int,
    appended: int,
    rows: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    turned: int,
    places: int,
) -> None:
    """What numbers on the host allow to check.

    Args:
        k_cache: as in `flash_attn_with_kvcache`.
        lengths: cache_seqlens as a tensor, or None.
        offset: cache_seqlens as a number.
        appended: new tokens of each sequence.
        rows: those of the cache for each sequence.
        cache_batch_idx: as in `flash_attn_with_kvcache`.
        cache_leftpad: as in `flash_attn_with_kvcache`.
        block_table: as in `flash_attn_with_kvcache`.
        turned: queries of each sequence that are turned each at a place of its own.
        places: rows of rotary_cos.
    """
    on_host = k_cache.device.type == "cpu"
    if appended > rows:
        raise ArgumentError(
            f"k has {appended} new tokens; allowed are the {rows} rows that the cache has for a sequence"
        )
    if lengths is None or (on_host and lengths.numel()):
        least, most = (offset, offset) if lengths is None else (int(x) for x in lengths.aminmax())
        if least < 0 or most + appended > rows:
            raise ArgumentError(
                f"cache_seqlens from {least} to {most} and {appended} new tokens; allowed are the {rows} rows "
                "that the cache has for a sequence"
            )
        if turned and most + turned > places:
            raise ArgumentError(
                f"rotary_cos has {places} rows; {turned} queries behind {most} tokens are turned at rows up to "
                f"{most + turned - 1}"
            )
    if on_host and cache_leftpad is not None and cache_leftpad.numel() and cache_leftpad.min() < 0:
        raise ArgumentError(f"cache_leftpad={cache_leftpad.tolist()}; allowed are 0 and more")
    entries = k_cache.shape[0]
    if on_host and cache_batch_idx is not None and cache_batch_idx.numel():
        least, most = (int(x) for x in cache_batch_idx.aminmax())
        if least < 0 or most >= entries:
            raise ArgumentError(f"cache_batch_idx from {least} to {most}; allowed is 0 to {entries - 1}")
        if appended and cache_batch_idx.unique().numel() < cache_batch_idx.numel():
            raise ArgumentError(
                f"cache_batch_idx={cache_batch_idx.tolist()} names an entry twice; two sequences cannot append to one"
            )
    if on_host and block_table is not None and block_table.numel():
        used = torch.full((block_table.shape[0],), offset) if lengths is None else lengths
        pages = torch.arange(block_table.shape[1]) * k_cache.shape[1] < (used + appended)[:, None]
        if bool((((block_table < 0) | (block_table >= entries)) & pages).any()):
            raise ArgumentError(f"block_table names pages that are not there; allowed is 0 to {entries - 1}")
