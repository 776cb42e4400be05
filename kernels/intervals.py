"""Which keys each query row of a launch may see: the only form in which masks reach the kernels.

Masks, documents, partitions and ring stages speak of global positions. Before a launch they are brought down to row
indices of the tensors at hand: query row t sees key rows start[t] to stop[t] (and, with sink tokens, sink_start[t]
to sink_stop[t] in front of them). Queries and keys lie in ascending global order, so all four never decrease with t.
From that monotony follow the bounds of any tile, by reading its first and last row or by binary search, on whichever
device the rows live and without copying anything back.

Sink tokens are a document's first tokens that every later query of it goes on seeing (Xiao et al., arXiv 2309.17453).
A prompt that several continuations share is to each of them what sink tokens are, of any length, and is passed as such.
Learned sink logits, which have no key, are something else, see ringflash.kernels.sinks.

Masks that are no such intervals have `blocks` beside them: a row then sees those keys of its interval that a layout of
blocks shows to it.

Legend: T query rows, S key rows, G groups of heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.kept import Kept, build_to_keep, capturing
from ringflash.kernels.key_blocks import KeyBlocks
from ringflash.kernels.torch_private import tree_leaves

Built = TypeVar("Built")


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """Visible key rows of each query row, as half-open index ranges into the key tensor of this launch.

    Attributes:
        start: (T,) int32, first visible key row; never decreases.
        stop: (T,) int32, one behind the last visible key row; never decreases. `stop <= start` means no key.
        key_count: S, the number of key rows.
        sink_start: (T,) int32 or None, first visible sink token, wholly before `start`; never decreases.
        sink_stop: (T,) int32 or None, one behind the last visible sink token; never decreases.
        blocks: which keys of their intervals rows see, if not all of them; not beside sink tokens.
        band: keys that a few rows see together, for kernels that hold all of them at once: of any rows t <= u,
            stop[u] - start[t] <= band + u - t. None where that is not known to the host, or not bounded.
        even: whether the host knows that most rows see as many keys each, as under a window in much longer sequences.
    """

    start: Tensor
    stop: Tensor
    key_count: int
    sink_start: Tensor | None = None
    sink_stop: Tensor | None = None
    blocks: KeyBlocks | None = field(default=None, kw_only=True)
    band: int | None = field(default=None, kw_only=True)
    even: bool = field(default=False, kw_only=True)
    _cache: dict = field(default_factory=dict, repr=False, kw_only=True)
    _cache_of_blocks: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("start", "stop", "sink_start", "sink_stop"):
            if (bound := getattr(self, name)) is not None:  # kernels read row t at address t
                object.__setattr__(self, name, bound.to(torch.int32).contiguous())
        if self.blocks is not None and self.has_sink_tokens:
            raise ArgumentError("intervals have blocks and sink tokens; allowed is one of them")

    @property
    def query_count(self) -> int:
        """T, the number of query rows."""
        return self.start.shape[0]

    @property
    def has_sink_tokens(self) -> bool:
        """Whether rows may see a second range in front of the first."""
        return self.sink_start is not None

    def ranges(self) -> list[tuple[Tensor, Tensor]]:
        """The (start, stop) pairs: the key range, then the sink tokens' if there is one."""
        pairs = [(self.start, self.stop)]
        if self.sink_start is not None and self.sink_stop is not None:
            pairs.append((self.sink_start, self.sink_stop))
        return pairs

    def tensors(self) -> list[Tensor]:
        """The ranges and all that was worked out of them, for counting bytes."""
        caches = [list(cache.values()) for cache in (self._cache, self._cache_of_blocks)]
        worked_out = (x for x in tree_leaves(caches) if isinstance(x, Tensor))
        layout = [] if self.blocks is None else self.blocks.tensors()
        return [*(bound for pair in self.ranges() for bound in pair), *layout, *worked_out]

    def of_keys(self, first: int, last: int) -> KeyIntervals:
        """The same over some of the key rows."""
        start, stop, *sinks = [x.clamp(first, last) - first for pair in self.ranges() for x in pair]
        blocks = self.blocks and self.blocks.of_keys(first, last)
        return KeyIntervals(start, stop, last - first, *sinks, blocks=blocks, band=self.band)

    def to(self, device: torch.device) -> KeyIntervals:
        """The same on another device."""
        start, stop, *sinks = [x.to(device) for pair in self.ranges() for x in pair]
        blocks = self.blocks and self.blocks.to(device)
        return KeyIntervals(start, stop, self.key_count, *sinks, blocks=blocks, band=self.band, even=self.even)

    def visible(self) -> Tensor:
        """Dense boolean (T, S) matrix of visible pairs, or with blocks (G, T, S), for the dense reference."""
        column = torch.arange(self.key_count, device=self.start.device)
        seen = [(start[:, None] <= column) & (column < stop[:, None]) for start, stop in self.ranges()]
        if self.blocks is not None:
            return seen[0] & self.blocks.visible()
        return seen[0] | seen[1] if self.has_sink_tokens else seen[0]

    def query_order(self, block: int) -> Tensor:
        """Tiles of `block` query rows, those with the most key rows first; (tiles,) int32.

        Long tiles first keep the last wave of a launch short.
        """
        return self.kept(("query_order", block), lambda: _longest_first(self._query_tile_work(block)))

    def key_tile_rows(self, block: int, sink_tokens: bool = False) -> Tensor:
        """Query rows that see each tile of `block` key rows; (tiles, 4) int32.

        Columns: first row that sees any key of the tile, first and one-behind-last row that see all of it, one
        behind the last row that sees any. Rows between are contiguous because start and stop never decrease.
        """

        def build() -> Tensor:
            start, stop = self.ranges()[1 if sink_tokens else 0]
            return _key_tile_rows(start, stop, self.key_count, block)

        return self.kept(("key_tile_rows", block, sink_tokens), build)

    def key_order(self, block: int) -> Tensor:
        """Tiles of `block` key rows, those seen by the most query rows first; (tiles,) int32."""

        def build() -> Tensor:
            rows = [self.key_tile_rows(block, bool(index)) for index in range(len(self.ranges()))]
            return _longest_first([rows_of_tile[:, 3] - rows_of_tile[:, 0] for rows_of_tile in rows])

        return self.kept(("key_order", block), build)

    def _query_tile_work(self, block: int) -> list[Tensor]:
        first, last = _tile_edges(self.query_count, block, self.start.device)[1]
        return [(stop[last] - start[first]).clamp_(min=0) for start, stop in self.ranges()]

    def with_blocks(self, blocks: KeyBlocks | None) -> KeyIntervals:
        """The same with other blocks; what was worked out of the intervals alone serves both."""
        return replace(self, blocks=blocks)

    def kept(self, name: tuple, build: Callable[[], Built], of_blocks: bool = False) -> Built:
        """What `build` makes of these intervals, made at the first call with this name and kept as long as they are.

        Args:
            name: to find it by.
            build: makes it.
            of_blocks: it depends on the blocks as well.
        """
        cache = self._cache_of_blocks if of_blocks else self._cache
        found = cache.get(name)
        if found is None:
            found = build_to_keep(build, self.start.device)
            if not capturing(self.start.device):
                cache[name] = found
        return found


_edges = Kept(128 * 2**20, size=lambda edges: sum(x.nbytes for x in edges))
"""`_tile_edges`, as many bytes of them."""


def _tile_edges(count: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last row of each tile of `block` rows, (2, tiles): one behind each as int32, and themselves int64."""
    if capturing(device):  # a graph has its own, as those that are kept may be forgotten before its last replay
        return _new_tile_edges(count, block, device)
    name = count, block, device
    found = _edges.get(name)
    if found is None:
        found = _edges.add(name, build_to_keep(functools.partial(_new_tile_edges, count, block, device), device))
    return found


def _new_tile_edges(count: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first = torch.arange(0, count, block, device=device)
    rows = torch.stack([first, (first + block).clamp(max=count) - 1])
    return (rows + 1).int(), rows


def _longest_first(work: list[Tensor]) -> Tensor:
    return torch.argsort(functools.reduce(torch.add, work), descending=True, stable=True).to(torch.int32)


def _key_tile_rows(start: Tensor, stop: Tensor, key_count: int, block: int) -> Tensor:
    edges, _ = _tile_edges(key_count, block, start.device)
    any_begin, all_begin = torch.searchsorted(stop, edges, out_int32=True)
    all_end, any_end = torch.searchsorted(start, edges, out_int32=True)
    any_end = torch.maximum(any_end, any_begin)
    all_begin = all_begin.clamp(min=any_begin, max=any_end)
    return torch.stack([any_begin, all_begin, all_end.clamp(min=all_begin, max=any_end), any_end], dim=1)


def causal_intervals(query_count: int, key_count: int, device: torch.device | str = "cpu") -> KeyIntervals:
    """Causal, aligned to the bottom right: the last query row sees every key row."""
    start = torch.zeros(query_count, dtype=torch.int32, device=device)
    stop = torch.arange(1 + key_count - query_count, 1 + key_count, dtype=torch.int32, device=device)
    return KeyIntervals(start, stop.clamp(min=0), key_count)
