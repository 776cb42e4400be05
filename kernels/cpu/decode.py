"""Attention to a cache of keys and values in torch operators, exact in float32; the contract is that of decode.py.

Legend: B sequences, S queries of each, n new keys of each, C rows of a sequence's part of the cache, H query heads,
Hk key heads, G = H / Hk, D head dimension of keys, V of values, N keys of a block, R rotated dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.decode import Cache, Rotary, Rules
from ringflash.kernels.overrun import refuse_or_note
from ringflash.kernels.rotary import rotate

BLOCK = 512
"""Keys that `attend` looks at together: bounds its memory."""


def append(key: Tensor, value: Tensor, cache: Cache, rotary: Rotary | None = None) -> None:
    """Write key (B, n, Hk, D) and value (B, n, Hk, V) behind the rows that are filled.

    Keys are rotated by `rotary` at the rows they come to. What the cache has no row for is refused on the CPU; on a GPU
    it is not written, and the word of ringflash.kernels.overrun says so.
    """
    if key.numel() == 0:
        return
    rows = used_rows(cache, key.shape[0])[:, None] + torch.arange(key.shape[1], device=key.device)
    if rotary is not None:
        key = rotated(key, rotary, rows)
    index, exists = cache_index(cache, rows)
    refuse_or_note(~exists, cache)
    write_existing(key, value, cache, index, exists)


def write_existing(key: Tensor, value: Tensor, cache: Cache, index: tuple[Tensor, Tensor], exists: Tensor) -> None:
    """Write the tokens of `append` whose row `exists`, (B, n), at `index`, without a look at which these are.

    Every token writes: those without a row write what the first token with one does, or if there is none, what their
    place holds already.
    """
    exists = exists.flatten()
    token = torch.arange(exists.numel(), device=exists.device).where(exists, exists.int().argmax())
    place = index[0].flatten()[token], index[1].flatten()[token]
    for new, old in ((key, cache.key), (value, cache.value)):
        old[place] = new.flatten(0, 1)[token].where(exists.any(), old[place])


def attend(
    query: Tensor, cache: Cache, rules: Rules, rotary: Rotary | None = None, appended: int = 0, splits: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of the queries to the cache, in blocks of keys with a running softmax.

    Args:
        query: (B, S, H, D), last dimension contiguous.
        cache: with the new keys in it, but `used` without them.
        rules: scores and mask.
        rotary: rotates the queries, at used[b] + i if `rules.local` and else at used[b].
        appended: n.
        splits: in how many parts a sequence's keys are shared out on a GPU; 0 chooses. Here they are one.

    Returns:
        out (B, S, H, V) in the query's dtype and lse (B, H, S) fp32, natural logarithm.
    """
    (batch, count, _, _), key_heads, wide = query.shape, cache.key.shape[2], _wide(query.dtype)
    if query.numel() == 0:
        shape = (*query.shape[:3], cache.value.shape[3])
        return query.new_empty(shape), query.new_empty((shape[0], shape[2], count), dtype=torch.float32)
    used, index = used_rows(cache, batch), torch.arange(count, device=query.device)
    if rotary is not None:
        query = rotated(query, rotary, used[:, None] + (index if rules.local else torch.zeros_like(index)))
    refuse_or_note(~has_all_rows(cache, used, appended), cache)
    total, first = used + appended, 0 if cache.leftpad is None else cache.leftpad.long()
    position_BS = total[:, None] - count + index
    stop_BS = total.clamp(max=cache.capacity)[:, None].expand_as(position_BS)
    start_BS = (torch.zeros_like(total) + first)[:, None].expand_as(position_BS)
    if rules.right is not None:
        stop_BS = torch.minimum(stop_BS, position_BS + rules.right + 1)
    if rules.left is not None:
        start_BS = torch.maximum(start_BS, position_BS - rules.left)

    # Bounds of the walk: on the CPU values are at hand, elsewhere reading them would be a wait.
    bounds = (int(start_BS.min()), int(stop_BS.max())) if query.device.type == "cpu" else None
    begin, end = (0, cache.capacity) if bounds is None else (max(bounds[0], 0), bounds[1])
    query_BKGSD = query.to(wide).unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)
    shape = query_BKGSD.shape[:4]
    maximum, weight_sum = query.new_full(shape, -torch.inf, dtype=wide), query.new_zeros(shape, dtype=wide)
    acc = query.new_zeros((*shape, cache.value.shape[-1]), dtype=wide)
    for block in range(begin, end, BLOCK):
        row_N = torch.arange(block, min(block + BLOCK, end), device=query.device)
        exists_BN = (row_N >= start_BS.amin(1, keepdim=True)) & (row_N < stop_BS.amax(1, keepdim=True))
        rows = tuple(x.where(exists_BN, 0) for x in cache_index(cache, row_N.expand(batch, -1))[0])
        # Rows that nobody sees may hold anything, and 0 * nan is not 0.
        key, value = (x[rows].to(wide).where(exists_BN[..., None, None], 0.0) for x in (cache.key, cache.value))
        scores = _scores(query_BKGSD, key, rules, (position_BS[..., None] - row_N).abs())
        visible_BSN = (row_N >= start_BS[..., None]) & (row_N < stop_BS[..., None])
        scores = scores.masked_fill(~visible_BSN[:, None, None], -torch.inf)
        new_maximum = torch.maximum(maximum, scores.amax(-1))
        offset = new_maximum.nan_to_num(neginf=0.0)
        weights, decay = torch.exp(scores - offset[..., None]), torch.exp(maximum - offset)
        weight_sum = weight_sum * decay + weights.sum(-1)
        acc = acc * decay[..., None] + weights @ value.permute(0, 2, 1, 3)[:, :, None]
        maximum = new_maximum
    out = acc / weight_sum.where(weight_sum > 0, 1.0)[..., None]
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype)
    return out.contiguous(), (maximum + weight_sum.log()).flatten(1, 2).float()


def used_rows(cache: Cache, batch: int) -> Tensor:
    """Rows of each sequence that are filled, (B,) int64."""
    if cache.lengths is None:
        return torch.full((batch,), cache.offset, device=cache.key.device)
    return cache.lengths.long() + cache.offset


def has_all_rows(cache: Cache, used: Tensor, appended: int) -> Tensor:
    """Whether the cache has all rows of each sequence, (B,), as far as the last one tells."""
    last = used + appended - 1
    return (used >= 0) & ((last < 0) | cache_index(cache, last[:, None])[1][:, 0])


def cache_index(cache: Cache, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Indices into the first two dimensions of the cache's key and value for rows (B, n) of each sequence.

    Beside them which of the rows exist; the indices of the others lie within the cache too.
    """
    exists = (rows >= 0) & (rows < cache.capacity)
    if cache.block_table is not None and cache.capacity:
        page_rows = cache.key.shape[1]
        rows = rows.where(exists, 0)
        entry = cache.block_table.long().gather(1, rows // page_rows)
        exists = exists & (entry >= 0) & (entry < cache.key.shape[0])
        return (entry.where(exists, 0), rows % page_rows), exists
    batch, index = torch.arange(rows.shape[0], device=rows.device), cache.batch_index
    entry = (batch if index is None else index.long())[:, None].expand_as(rows)
    return (entry, rows.where(exists, 0)), exists


def rotated(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """X (B, n, heads, D) rotated at positions (B, n), in fp32, and rounded once."""
    positions = positions.clamp(0, rotary.cos.shape[0] - 1)
    cos, sin = (angles[positions].unsqueeze(2) for angles in (rotary.cos, rotary.sin))
    return rotate(x, cos, sin, rotary.interleaved)


def _scores(query_BKGSD: Tensor, key_BNKD: Tensor, rules: Rules, distance_BSN: Tensor) -> Tensor:
    scores = query_BKGSD @ key_BNKD.permute(0, 2, 3, 1)[:, :, None] * rules.scale
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.slopes is not None:
        slopes = rules.slopes.to(scores.dtype).unflatten(-1, scores.shape[1:3])[..., None, None]
        scores = scores - slopes * distance_BSN[:, None, None]
    return scores


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
