"""Problems of attention to a cache, their float64 answer by definition, and torch's own in their dtype.

The answer is written down sequence by sequence and pair by pair; nothing of the library is used.

Legend: B sequences, S queries of each, n new keys of each, C rows of a sequence's part of the cache, H query heads,
Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

Answer = tuple[Tensor, ...]
"""out (B, S, H, Dv), lse (B, H, S), and the keys and values (total, Hk, ...) that the sequences hold afterwards."""


@dataclass(frozen=True)
class CacheCase:
    """One problem without its tensors; `appended` None gives no new keys, `rotary` 0 no embedding."""

    batch: int = 2
    queries: int = 1
    appended: int | None = 1
    rows: int = 48
    page: int | None = None
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    rotary: int = 0
    rotary_fp32: bool = False
    interleaved: bool = True
    seqlens: str = "tensor"
    batch_index: bool = False
    leftpad: bool = False
    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    splits: int = 0
    seed: int = 0

    @property
    def capacity(self) -> int:
        """C."""
        return self.rows if self.page is None else -(-self.rows // self.page) * self.page

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        left, right = (None if x < 0 else x for x in self.window)
        return left, 0 if self.causal else right


@dataclass(frozen=True)
class CacheTensors:
    """What `flash_attn_with_kvcache` is given."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    lengths: Tensor
    batch_index: Tensor | None
    leftpad: Tensor | None
    block_table: Tensor | None
    slopes: Tensor | None

    def to(self, device: str) -> CacheTensors:
        """Copies on a device."""
        return CacheTensors(**{name: None if x is None else x.to(device).clone() for name, x in vars(self).items()})


def tensors(case: CacheCase) -> CacheTensors:
    """Random tensors. Rows of the cache that no sequence has filled are not numbers, and unused pages do not exist."""
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    def whole(low: int, high: int, count: int = case.batch) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=random, dtype=torch.int32)

    (heads, key_heads), (dim, value_dim), new = case.heads, case.dims, case.appended or 0
    lengths = {
        "tensor": whole(0, case.capacity - new),
        "int": whole(0, case.capacity - new, 1).expand(case.batch),
        "all": torch.full((case.batch,), case.capacity, dtype=torch.int32),
    }[case.seqlens]
    pages = None if case.page is None else case.capacity // case.page
    entries = case.batch + 2 if case.batch_index else case.batch
    shape = (entries, case.capacity) if pages is None else (case.batch * pages + 3, case.page)
    table = batch_index = None
    if pages is not None:
        table = torch.randperm(shape[0], generator=random)[: case.batch * pages].view(case.batch, pages).int()
        unused = torch.arange(pages) * case.page >= (lengths + new)[:, None]
        table = table.masked_fill(unused, -(2**30))
    elif case.batch_index:
        batch_index = torch.randperm(entries, generator=random)[: case.batch].int()
    leftpad = torch.minimum(whole(0, case.capacity // 2), lengths) if case.leftpad else None
    slopes = {"": None, "heads": (heads,), "sequences": (case.batch, heads)}[case.alibi]
    angles = draw(case.capacity + case.queries, case.rotary // 2, dtype=torch.float32) if case.rotary else None
    rotary_dtype = torch.float32 if case.rotary_fp32 else case.dtype
    given = CacheTensors(
        draw(case.batch, case.queries, heads, dim),
        draw(*shape, key_heads, dim),
        draw(*shape, key_heads, value_dim),
        *(None if case.appended is None else draw(case.batch, new, key_heads, d) for d in (dim, value_dim)),
        *(None if angles is None else turn(angles).to(rotary_dtype) for turn in (torch.cos, torch.sin)),
        lengths,
        batch_index,
        leftpad,
        table,
        None if slopes is None else torch.rand(slopes, generator=random),
    )
    filled = torch.zeros(shape, dtype=torch.bool)
    for sequence, (first, last) in enumerate(spans(case, given)):
        filled[places(case, given, sequence, range(first, last - new))] = True
    for cache in (given.k_cache, given.v_cache):
        cache[~filled] = torch.nan
    return given


def spans(case: CacheCase, given: CacheTensors) -> list[tuple[int, int]]:
    """First filled row and end of each sequence, new keys included."""
    first = [0] * case.batch if given.leftpad is None else given.leftpad.tolist()
    return list(zip(first, (given.lengths + (case.appended or 0)).tolist(), strict=True))


def places(case: CacheCase, given: CacheTensors, sequence: int, rows: range) -> tuple[list[int], list[int]]:
    """Indices into the cache of rows of a sequence."""
    if case.page is None:
        entry = sequence if given.batch_index is None else int(given.batch_index[sequence])
        return [entry] * len(rows), list(rows)
    return [int(given.block_table[sequence, row // case.page]) for row in rows], [row % case.page for row in rows]


def call(function: Callable, case: CacheCase, given: CacheTensors) -> Answer:
    """What the function returns and leaves in the caches, which are copied first."""
    given = given.to(str(given.q.device))
    seqlens = {"tensor": given.lengths, "int": int(given.lengths[0]), "all": None}[case.seqlens]
    out, lse = function(
        given.q, given.k_cache, given.v_cache, given.k, given.v, given.cos, given.sin, seqlens, given.batch_index,
        given.leftpad, given.block_table, case.scale, case.causal, case.window, case.softcap, case.interleaved,
        given.slopes, case.splits, True,
    )  # fmt: skip
    return out, lse, *held(case, given)


def held(case: CacheCase, given: CacheTensors) -> tuple[Tensor, Tensor]:
    """Keys and values of all sequences end to end."""
    found = ([], [])
    for sequence, (first, last) in enumerate(spans(case, given)):
        for rows, cache in zip(found, (given.k_cache, given.v_cache), strict=True):
            rows.append(cache[places(case, given, sequence, range(first, last))])
    return torch.cat(found[0]), torch.cat(found[1])


def by_definition(case: CacheCase, given: CacheTensors, wide: torch.dtype) -> Answer:
    """Scores and rotations in `wide`, everything else in the tensors' dtype; in float64 throughout if they are."""
    device = given.q.device
    given = given.to(str(device))
    left, right = case.bounds
    scale = case.dims[0] ** -0.5 if case.scale is None else case.scale
    outs, lses = [], []
    for sequence, (first, last) in enumerate(spans(case, given)):
        begin, q = int(given.lengths[sequence]), given.q[sequence]
        if case.appended is not None:
            key, cells = given.k[sequence], places(case, given, sequence, range(begin, last))
            if case.rotary:
                key = turned(case, given, key, range(begin, last), wide)
            given.k_cache[cells], given.v_cache[cells] = key, given.v[sequence]
        if case.rotary:
            moves = left is not None or right is not None
            q = turned(case, given, q, [begin + (i if moves else 0) for i in range(case.queries)], wide)
        cells = places(case, given, sequence, range(first, last))
        key, value = (
            x[cells].repeat_interleave(case.heads[0] // case.heads[1], dim=1) for x in (given.k_cache, given.v_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", q.to(wide), key.to(wide)) * scale
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        place = torch.arange(last - case.queries, last, device=device)
        distance = place[:, None] - torch.arange(first, last, device=device)
        if given.slopes is not None:
            slopes = given.slopes.expand(case.batch, -1)[sequence].to(wide)
            scores = scores - slopes[:, None, None] * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            hidden |= distance > left
        if right is not None:
            hidden |= -distance > right
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).to(value.dtype)
        outs.append(torch.einsum("hqk,khd->qhd", weights, value))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), *held(case, given)


def turned(case: CacheCase, given: CacheTensors, x: Tensor, rows: range | list[int], wide: torch.dtype) -> Tensor:
    """Each token (heads, D) of x turned at its row: dimensions 2j and 2j + 1, or j and j + R / 2, are a pair."""
    half = case.rotary // 2
    first, second = (
        (range(0, 2 * half, 2), range(1, 2 * half, 2)) if case.interleaved else (range(half), range(half, 2 * half))
    )
    cos, sin = (table[list(rows)].to(wide)[:, None] for table in (given.cos, given.sin))
    low, high = (x[..., list(pair)].to(wide) for pair in (first, second))
    result = x.clone()
    result[..., list(first)] = (low * cos - high * sin).to(x.dtype)
    result[..., list(second)] = (low * sin + high * cos).to(x.dtype)
    return result


def assert_as_exact_as_torch(found: Answer, case: CacheCase, given: CacheTensors) -> None:
    """At most twice the error of the definition in the same dtype, and 1e-5; its largest over many alike problems."""
    wide = replace(given, **{n: x.double() for n, x in vars(given).items() if x is not None and x.is_floating_point()})
    right = by_definition(case, wide, torch.float64)
    limits = [0.0] * 4
    for seed in range(8 if case.dtype != torch.float32 else 1):
        alike = given if seed == 0 else tensors(replace(case, seed=case.seed + seed)).to(str(given.q.device))
        doubled = {n: x.double() for n, x in vars(alike).items() if x is not None and x.is_floating_point()}
        exact = right if seed == 0 else by_definition(case, replace(alike, **doubled), torch.float64)
        own = by_definition(case, alike, torch.float32)
        limits = [max(pair) for pair in zip(limits, map(largest_error, own, exact), strict=True)]
    for name, x, y, limit in zip(("out", "lse", "keys", "values"), found, right, limits, strict=True):
        error = largest_error(x.to(y.device), y)
        assert error <= 2 * limit + 1e-5, f"{name}: error {error:.3g}, torch's own {limit:.3g}"


def largest_error(x: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinite unless what is infinite is so in both."""
    assert x.shape == right.shape
    x = x.double()
    return (x - right).abs().masked_fill(x == right, 0).nan_to_num(nan=torch.inf).max().item() if x.numel() else 0.0


@st.composite
def cache_cases(draw: st.DrawFn, dtype: torch.dtype, most_rows: int = 70) -> CacheCase:
    """Any combination of arguments."""
    queries = draw(st.sampled_from([1, 1, 2, 5, 9]))
    appended = draw(st.sampled_from([None, 0, 1, 3, queries]))
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4)]))
    dim = draw(st.sampled_from([8, 16, 40]))
    paged = draw(st.booleans())
    bound = st.sampled_from([-1, -1, 0, 3, 20, 2**31 - 1])
    return CacheCase(
        batch=draw(st.integers(1, 3)),
        queries=queries,
        appended=appended,
        rows=draw(st.integers(max(queries, 10), most_rows)),
        page=draw(st.sampled_from([1, 7, 16, 32])) if paged else None,
        heads=(key_heads * group, key_heads),
        dims=(dim, draw(st.sampled_from([dim, dim, 24]))),
        dtype=dtype,
        rotary=0 if appended is None else draw(st.sampled_from([0, 2, 8, dim])),
        rotary_fp32=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        seqlens=draw(st.sampled_from(["tensor", "tensor", "int"] + ["all"] * (appended is None))),
        batch_index=not paged and draw(st.booleans()),
        leftpad=draw(st.integers(0, 3)) == 0,
        scale=draw(st.sampled_from([None, 0.1, 0.7])),
        causal=draw(st.booleans()),
        window=(draw(bound), draw(bound)),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        alibi=draw(st.sampled_from(["", "", "heads", "sequences"])),
        splits=draw(st.sampled_from([0, 0, 1, 3, 7])),
        seed=draw(st.integers(0, 2**20)),
    )
