"""Attention of a few new queries to a cache of keys and values: the contract, and its form in torch operators.

An implementation is a module with two functions, `append` and `attend`, that mean what those here mean:
ringflash.kernels.decode, which runs wherever torch does and is exact in float32 (float64 for float64), and
ringflash.kernels.triton.decode. `ringflash.kernels.select` chooses. Neither reads a tensor's values on the host.

Sequence b fills the rows [leftpad[b], used[b]) of its part of the cache. With n keys appended, query i of S stands at
row used[b] + n - S + i: the last query at the last key. It sees the rows from its place - left to its place + right
that are filled; one that sees none gets 0 and a log-sum-exp of -inf.

Legend: B sequences, S queries of each, n new keys of each, C rows of a sequence's part of the cache, H query heads,
Hk key heads, G = H / Hk, D head dimension of keys, V of values, N keys of a block, R rotated dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 512
"""Keys that `attend` looks at together: bounds its memory."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of earlier tokens, and where those of each sequence lie.

    Attributes:
        key: (batch of the cache, C, Hk, D), or (pages, rows of a page, Hk, D) with block_table.
        value: the same with V.
        lengths: (B,) int32 or None for zeros; used[b] is lengths[b] + offset.
        offset: see lengths.
        leftpad: (B,) int32 first filled row, or None for 0.
        batch_index: (B,) int32 entry of the cache that is sequence b's; None for b.
        block_table: (B, pages of a sequence) int32, or None. Entries behind a sequence's end are never read through.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    offset: int = 0
    leftpad: Tensor | None = None
    batch_index: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """C."""
        return self.key.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])

    def used(self, batch: int) -> Tensor:
        """Rows of each sequence that are filled, (B,) int64."""
        if self.lengths is None:
            return torch.full((batch,), self.offset, device=self.key.device)
        return self.lengths.long() + self.offset

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into the first two dimensions of key and value for rows (B, n) of each sequence."""
        if self.block_table is not None:
            return self.block_table.long().gather(1, rows // self.key.shape[1]), rows % self.key.shape[1]
        batch = torch.arange(rows.shape[0], device=rows.device) if self.batch_index is None else self.batch_index.long()
        return batch[:, None].expand_as(rows), rows


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding (Su et al., arXiv 2104.09864) of the first R dimensions.

    Attributes:
        cos: (places, R / 2).
        sin: (places, R / 2).
        interleaved: turns dimensions 2j and 2j + 1 together, instead of j and j + R / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Turn x (B, n, heads, D) at places (B, n), in fp32, and round once."""
        places = places.clamp(0, self.cos.shape[0] - 1)
        cos, sin = (table[places].to(_wide(x.dtype)).unsqueeze(2) for table in (self.cos, self.sin))
        turned, rest = x[..., : 2 * cos.shape[-1]].to(cos.dtype), x[..., 2 * cos.shape[-1] :]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x.dtype), rest], -1)


@dataclass(frozen=True, eq=False)
class Rules:
    """How scores are made and which of them count.

    Attributes:
        scale: factor of the scores.
        left: rows that a query sees before its place; None for no bound.
        right: rows that it sees behind its place; None for no bound.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        slopes: ALiBi slopes (H,) or (B, H) fp32, or None.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None

    @property
    def local(self) -> bool:
        """Whether the place of a query matters to what it sees."""
        return self.left is not None or self.right is not None


def append(key: Tensor, value: Tensor, cache: Cache, rotary: Rotary | None = None) -> None:
    """Write key (B, n, Hk, D) and value (B, n, Hk, V) behind the rows that are filled.

    Keys are turned by `rotary` at the rows they come to. Nothing is written where the cache has no rows: here torch
    refuses such indices, kernels on GPUs pass over them.
    """
    rows = cache.used(key.shape[0])[:, None] + torch.arange(key.shape[1], device=key.device)
    if rotary is not None:
        key = rotary.turn(key, rows)
    places = cache.places(rows)
    cache.key[places], cache.value[places] = key, value


def attend(
    query: Tensor, cache: Cache, rules: Rules, rotary: Rotary | None = None, appended: int = 0, splits: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of the queries to the cache, in blocks of keys with a running softmax.

    Args:
        query: (B, S, H, D), last dimension contiguous.
        cache: with the new keys in it, but `used` without them.
        rules: scores and mask.
        rotary: turns the queries, at used[b] + i if `rules.local` and else at used[b].
        appended: n.
        splits: in how many parts a sequence's keys are shared out on a GPU; 0 chooses. Here they are one.

    Returns:
        out (B, S, H, V) in the query's dtype and lse (B, H, S) fp32, natural logarithm.
    """
    (batch, count, _, _), key_heads, wide = query.shape, cache.key.shape[2], _wide(query.dtype)
    if query.numel() == 0:
        shape = (*query.shape[:3], cache.value.shape[3])
        return query.new_empty(shape), query.new_empty((shape[0], shape[2], count), dtype=torch.float32)
    used, index = cache.used(batch), torch.arange(count, device=query.device)
    if rotary is not None:
        query = rotary.turn(query, used[:, None] + (index if rules.local else torch.zeros_like(index)))
    total, first = used + appended, 0 if cache.leftpad is None else cache.leftpad.long()
    place_BS = total[:, None] - count + index
    stop_BS = total.clamp(max=cache.capacity)[:, None].expand_as(place_BS)
    start_BS = (torch.zeros_like(total) + first)[:, None].expand_as(place_BS)
    if rules.right is not None:
        stop_BS = torch.minimum(stop_BS, place_BS + rules.right + 1)
    if rules.left is not None:
        start_BS = torch.maximum(start_BS, place_BS - rules.left)

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
        places = [x.where(exists_BN, 0) for x in cache.places(row_N.expand(batch, -1))]
        # Rows that nobody sees may hold anything, and 0 * nan is not 0.
        key, value = (
            x[tuple(places)].to(wide).where(exists_BN[..., None, None], 0.0) for x in (cache.key, cache.value)
        )
        scores = _scores(query_BKGSD, key, rules, (place_BS[..., None] - row_N).abs())
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
