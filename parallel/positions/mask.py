"""Which keys a query may see, as a function of global token positions.

Every mask here but one gives a query at position p one key interval [start(p), stop(p)), both ends never decreasing in
p, and, where sink tokens are asked for or several branches share a prompt, one interval in front of it. The one is
`Mask.blocks`, which hides blocks of what the others show. Masks compose by intersection (`&`). A mask knows nothing of
ranks or devices: partitions, plans and kernels ask it about positions.

    mask = Mask.causal() & Mask.documents([0, 700, 4096]) & Mask.sliding_window(left=511)
    mask.key_interval(800)                                  # (700, 801)
    mask.keys_needed((600, 900))                            # ((89, 900),)
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.blocks import BlockLayout, RoutedLayout
from ringflash.parallel.positions.branches import Branches
from ringflash.parallel.positions.documents import boundaries_of, document_at, longest, refine
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.segments import Interval, Segments, intersect, normalize
from ringflash.parallel.positions.spans import spans_of, stop_of

UNBOUNDED = 2**31 - 1
"""Position behind every token; positions are 32-bit in the kernels."""


@dataclass(frozen=True)
class Mask:
    """An intersection of interval rules over global positions; build it with the constructors below.

    Attributes:
        left: a query at p sees no key before p - left (None: no such bound).
        right: a query at p sees no key behind p + right (0 is causal; None: no such bound).
        prefix: prefix-LM; the first `prefix` tokens of a document see each other, the rest is causal. One length for
            all documents, or one for each document.
        chunks: chunk sizes, counted from each document's start; a query sees its own chunk only.
        sink: the first `sink` tokens of a document stay visible beyond `sink_left`.
        sink_left: like `left`, but sink tokens are exempt from it.
        boundaries: ascending document boundaries (0, ..., total); a query sees its own document only.
        query_boundaries: the queries' own boundaries where they differ from the keys' (cross attention, or a cache
            longer than the queries). Document i of the queries sees document i of the keys, aligned at their ends: the
            last query stands at the position of the last key.
        layout: blocks of keys that each block of queries sees, counted from each document's start.
        routed: the same, of which the host knows nothing but the sizes; plans take it for one that shows everything.
        spans: a query sees no key behind itself but those of the span that holds it; without a bound `right`.
        branches: a query sees its own branch or prompt, and the prompt in front of its branch.
    """

    left: int | None = None
    right: int | None = None
    prefix: int | tuple[int, ...] | None = None
    chunks: tuple[int, ...] = ()
    sink: int = 0
    sink_left: int | None = None
    boundaries: tuple[int, ...] | None = None
    query_boundaries: tuple[int, ...] | None = None
    layout: BlockLayout | None = None
    routed: RoutedLayout | None = None
    spans: Segments | None = None
    branches: Branches | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prefix, tuple) and self.boundaries and len(self.prefix) != len(self.boundaries) - 1:
            raise ArgumentError(
                f"prefix_lm has {len(self.prefix)} lengths for {len(self.boundaries) - 1} documents; "
                "allowed is one length for all, or one for each document"
            )
        if self.layout is not None and self.routed is not None:
            raise ArgumentError(
                "cannot intersect a layout of blocks that the host reads with one that it does not; allowed are two "
                "of a kind: give both as tensors (groups of heads, query blocks, key blocks)"
            )
        for layout in (self.layout, self.routed):
            if layout is not None and self.boundaries is not None:
                layout.check_reach("queries", longest(self.query_boundaries or self.boundaries))
                layout.check_reach("keys", longest(self.boundaries))
        if self.spans is not None and self.right is not None:
            raise ArgumentError(
                f"cannot intersect spans with a bound right={self.right}, as of causal() and sliding_window(left): it "
                "hides what they show. A mask with spans is causal already; a window beside it has right=None"
            )
        if self.branches is not None:
            self._check_beside_branches()

    def _check_beside_branches(self) -> None:
        left = self.sink_left if self.left is None else self.left
        for name, size in (("sliding_window: left", left), ("chunked: size", min(self.chunks, default=None))):
            if size is not None:
                raise ArgumentError(
                    f"cannot intersect shared_prefix with {name}={size}: the distance from the prompt begins anew in "
                    "each branch. Lay the prompt in front of each branch instead, as documents, or show blocks"
                )

    def __hash__(self) -> int:
        return self._hash  # of thousands of boundaries: once is enough

    @cached_property
    def _hash(self) -> int:
        return hash(_ALL_FIELDS(self))

    def __getstate__(self) -> dict[str, object]:
        # Without the hash: None has another in another process.
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    # Constructors

    @staticmethod
    def bidirectional() -> Mask:
        """Every query sees every key."""
        return Mask()

    @staticmethod
    def causal(spans: Sequence[Sequence[int]] = ()) -> Mask:
        """A query at p sees the keys up to and including p, and all of the span that holds it.

        Args:
            spans: (start, stop) of stretches whose tokens see each other both ways, as those of each image do in Gemma
                3, where its `token_type_ids` are 1; positions over the tokens laid end to end, as in `documents`,
                ascending and apart. What hides a pair elsewhere, as documents and windows do, hides it in a span too.
                A window beside spans is `Mask.sliding_window(left, None)`: a bound to the right would hide them.

        Example:
            >>> mask = Mask.causal(spans=[(2, 5)])  # one image of three tokens
            >>> [mask.key_interval(position) for position in (1, 2, 4, 5)]
            [(0, 2), (0, 5), (0, 5), (0, 6)]
        """
        return Mask(spans=spans_of(spans)) if len(spans) else Mask(right=0)

    @staticmethod
    def sliding_window(left: int | None, right: int | None = 0, sink: int = 0) -> Mask:
        """A query at p sees keys p - left to p + right, and the first `sink` tokens of its document.

        Args:
            left: tokens before the query, at least 0; None for no bound.
            right: tokens behind the query, at least 0; None for no bound.
            sink: document prefix that the left bound does not hide (StreamingLLM, arXiv 2309.17453).
        """
        for name, value in (("left", left), ("right", right), ("sink", sink)):
            if value is not None and (isinstance(value, float) or value < 0):
                raise ArgumentError(f"sliding_window: {name}={value}; allowed are integers from 0, or None")
        if sink and left is not None:
            return Mask(right=right, sink=sink, sink_left=left)
        return Mask(left=left, right=right)

    @staticmethod
    def documents(cu_seqlens: Sequence[int], query_cu_seqlens: Sequence[int] | None = None) -> Mask:
        """Documents laid end to end; a query sees its own document only.

        Args:
            cu_seqlens: ascending boundaries, first 0. Empty documents are allowed. Tokens behind the last boundary
                belong to none: they see nothing, and nobody sees them.
            query_cu_seqlens: boundaries of the queries, as many, where they differ from those of the keys.
        """
        keys, queries = boundaries_of(cu_seqlens, query_cu_seqlens)
        return Mask(boundaries=keys, query_boundaries=queries)

    @staticmethod
    def chunked(size: int) -> Mask:
        """Llama 4's chunked attention: a query sees its own chunk of `size` tokens, counted from its document."""
        if isinstance(size, float) or size < 1:
            raise ArgumentError(f"chunked: size={size}; allowed are integers from 1")
        return Mask(chunks=(size,))

    @staticmethod
    def prefix_lm(length: int | Sequence[int]) -> Mask:
        """The first `length` tokens of each document see each other; all other tokens are causal.

        Args:
            length: one number for every document, or one per document of the `documents` mask it is composed with.
        """
        lengths = length if isinstance(length, int) else integers("prefix_lm: length", length)
        if any(x < 0 for x in ((lengths,) if isinstance(lengths, int) else lengths)):
            raise ArgumentError(f"prefix_lm: length={length}; allowed is 0 and more")
        return Mask(prefix=lengths)

    @staticmethod
    def shared_prefix(
        prompts: Sequence[int], branches: Sequence[Sequence[int]], spans: Sequence[Sequence[int]] = ()
    ) -> Mask:
        """Several continuations of one prompt, which is there once, as in reinforcement learning; causal.

        A group is a prompt with its branches laid end to end behind it, and groups follow each other. A token sees what
        it would see if its branch stood alone behind the prompt: the prompt up to itself or whole, then its own branch
        up to itself. Each group is a document. `Sharding` and `shard_batch` count `position_ids` on from the prompt in
        each branch, and give no label to the prompt's last token, behind which every branch goes on, nor to the last
        one of a branch: to learn a branch's first token, begin the branch with the prompt's last one. Windows and
        chunks are refused beside it.

        Args:
            prompts: tokens of each group's prompt.
            branches: for each group the tokens of each of its branches.
            spans: as in `causal`; a span ends with the prompt or branch that it began in.

        Example:
            >>> mask = Mask.shared_prefix(prompts=[8192], branches=[[4096] * 8])  # 40,960 tokens in place of 98,304
            >>> mask.sink_interval(20000), mask.key_interval(20000)  # the prompt, and the third branch so far
            ((0, 8192), (16384, 20001))
        """
        lengths = Branches.of_lengths(prompts, branches)
        return Mask(boundaries=lengths.boundaries, branches=lengths) & Mask.causal(spans)

    @staticmethod
    def blocks(layout: Sequence[Sequence[bool]] | Tensor, block_size: int | tuple[int, int]) -> Mask:
        """Any pattern of blocks: a query in block i sees the keys in block j where layout[i][j] is True.

        The way out for masks that no other constructor describes: selected blocks, strides, global and random blocks,
        and what a model's own router chooses. It is exact, and works like other masks with every feature, on one device
        and under every partition. Kernels visit those of their own blocks of which something is shown and no others;
        multiples of 128 tokens, of which they see all, suit them best.

        A layout on the host, as two dimensions, is part of the mask: plans move the keys that it shows, and to
        torch.compile it is a constant. A tensor on a device, or of three dimensions, the host does not read: it comes
        with each call, as queries do, may be made in code that torch.compile traces, and plans move keys as if it
        showed all. All ranks give the same one, of the whole sequence.

        Args:
            layout: (query blocks, key blocks) booleans for all heads, as a tensor, an array or lists; or a tensor
                (groups, query blocks, key blocks), the first group for the first key heads and their queries, and so
                on; groups divide the key heads. Rows count the queries of a document from its first one, columns its
                keys, so that all documents, and all sequences of a batch, have the same layout. It must reach over the
                longest of them; the last block may be cut off. Where documents differ in layout, give one layout over
                all of them instead of their boundaries.
            block_size: tokens of a block, at least 1; or (tokens of a query block, tokens of a key block).

        Example:
            >>> near = torch.ones(64, 64).tril().triu(-3)  # each block and the 3 blocks before it,
            >>> near[:, ::16] = 1  # and 4 blocks that every later one sees
            >>> mask = Mask.causal() & Mask.blocks(near.tril().bool(), block_size=64)
            >>> mask.keys_needed((2048, 2050))
            ((0, 64), (1024, 1088), (1856, 2050))
        """
        if isinstance(layout, Tensor) and (layout.dim() > 2 or layout.device.type != "cpu"):
            return Mask(routed=RoutedLayout.of_tensor(layout, block_size))
        return Mask(layout=BlockLayout.of_blocks(layout, block_size))

    def __and__(self, other: Mask) -> Mask:
        """Pairs that both masks allow."""
        if self.sink and other.sink and self.sink != other.sink:
            raise ArgumentError(f"cannot intersect windows with different sinks: {self.sink} and {other.sink}")
        if self.branches and other.branches and self.branches != other.branches:
            raise ArgumentError("cannot intersect shared prefixes of differing lengths")
        spans = self.spans if other.spans is None else other.spans
        if self.spans is not None and other.spans is not None:
            spans = intersect(self.spans, other.spans)
        boundaries, query_boundaries = refine(
            (self.boundaries, self.query_boundaries), (other.boundaries, other.query_boundaries)
        )
        return Mask(
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            prefix=_least_prefix(self.prefix, other.prefix),
            chunks=tuple(sorted({*self.chunks, *other.chunks})),
            sink=max(self.sink, other.sink),
            sink_left=_least(self.sink_left, other.sink_left),
            boundaries=boundaries,
            query_boundaries=query_boundaries,
            layout=self.layout & other.layout if self.layout and other.layout else self.layout or other.layout,
            routed=self.routed & other.routed if self.routed and other.routed else self.routed or other.routed,
            spans=spans,
            branches=self.branches or other.branches,
        )

    # Text form

    def spec(self, documents: bool = True) -> str:
        """The mask as text, with or without the document boundaries; `from_spec` reads it.

        Of a layout that the host does not read it says the sizes alone.
        """
        rules = {
            "left": self.left,
            "right": self.right,
            "prefix": self.prefix,
            "chunks": self.chunks or None,
            "sink": self.sink or None,
            "sink_left": self.sink_left,
            "boundaries": self.boundaries if documents else None,
            "query_boundaries": self.query_boundaries if documents else None,
            "spans": None if self.spans is None else tuple([edge for span in self.spans for edge in span]),
        }
        # JSON written by hand, because torch.compile traces this and cannot trace the json module.
        texts = [f'"{name}": {_constant(value)}' for name, value in rules.items() if value is not None]
        texts += [] if self.layout is None else [f'"layout": {self.layout.text}']
        if self.routed is not None:
            texts.append(f'"routed": {_constant((*self.routed.sizes, *self.routed.shape))}')
        if self.branches is not None:
            texts.append(f'"branches": {[_constant(group) for group in self.branches.groups]}')
        return "{" + ", ".join(texts) + "}"

    @staticmethod
    @lru_cache(maxsize=64)
    def from_spec(spec: str) -> Mask:
        """The mask that `spec` wrote."""
        rules = json.loads(spec)
        layout, routed, spans, branches = (rules.pop(x, None) for x in ("layout", "routed", "spans", "branches"))
        rules: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in rules.items()}
        return Mask(
            **rules,
            layout=None if layout is None else BlockLayout.from_json(layout),
            routed=None if routed is None else RoutedLayout((routed[0], routed[1]), (routed[2], routed[3], routed[4])),
            spans=None if spans is None else tuple(zip(spans[::2], spans[1::2], strict=True)),
            branches=None if branches is None else Branches(tuple(map(tuple, branches))),
        )

    # Questions

    @cached_property
    def two_intervals(self) -> bool:
        """Whether a query of a layer may see a second interval of keys, in front of its own."""
        return self.sink > 0 or self.branches is not None

    @property
    def has_layout(self) -> bool:
        """Whether a layout of blocks hides some of what the other rules show."""
        return self.layout is not None or self.routed is not None

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Query tokens and key tokens of a block of the layout."""
        if self.routed is not None:
            return self.routed.sizes
        assert self.layout is not None
        return self.layout.size, self.layout.key_size

    @property
    def block_counts(self) -> tuple[int, int]:
        """Rows and columns of the layout."""
        if self.routed is not None:
            return self.routed.shape[1:]
        assert self.layout is not None
        return self.layout.matrix.shape

    @property
    def blocks_given(self) -> Tensor | None:
        """A layout that the host does not read, (groups of heads, query blocks, key blocks) bool."""
        return None if self.routed is None else self.routed.shown

    def planned(self) -> Mask:
        """The mask without what the host does not read: what is planned for it serves every layout of these sizes."""
        if self.routed is None or self.routed.shown is None:
            return self
        return replace(self, routed=replace(self.routed, shown=None))

    @property
    def layers(self) -> tuple[Mask, ...]:
        """Masks of one interval, beside sinks, for each query; they show each pair of this mask once. Often itself.

        Pairs are counted by them. A layout that the host does not read is taken for one that shows everything.
        """
        return (self,) if self.layout is None else self._layers

    @cached_property
    def _layers(self) -> tuple[Mask, ...]:
        # Without blocks that other rules hide there are fewer. Where queries may stand elsewhere than their numbers in
        # the layout say, a bound may hide any block.
        aligned = self.boundaries is not None and self.query_boundaries is None
        assert self.layout is not None
        layout = self.layout.near(self.left, self.right) if aligned else self.layout
        return tuple(replace(self, layout=layer) for layer in layout.layers)

    def without_documents(self) -> Mask:
        """The same rules with the document boundaries left out, for callers that carry them as a tensor."""
        return replace(self, boundaries=None, query_boundaries=None)

    def document_of(self, query: int) -> int | None:
        """Index of the document that holds a query position; 0 without documents, None behind the last one."""
        bounds = self.query_boundaries or self.boundaries
        if bounds is None:
            if isinstance(self.prefix, tuple) and len(self.prefix) > 1:
                raise ArgumentError(
                    f"prefix_lm has {len(self.prefix)} lengths, but there are no documents; compose it with "
                    "Mask.documents, or give one length"
                )
            return 0
        return document_at(query, bounds)

    def key_interval(self, position: int) -> Interval:
        """Keys that the query at `position` sees, without `sink_interval`; of a mask of several layers, ask each."""
        return self._intervals(position)[1]

    def sink_interval(self, position: int) -> Interval:
        """Sink keys, or the prompt, that the query at `position` sees in front of its key interval.

        Often empty: (a, b) with b <= a.
        """
        return self._intervals(position)[0]

    def sees(self, query: int, key: int) -> bool:
        """Whether the query position sees the key position: the definition of the mask."""
        if self.layout is not None and self.document_of(query) is not None:
            query_begin, key_begin = self._origins(query)
            if not self.layout.sees(query - query_begin, key - key_begin):
                return False
        return any(start <= key < stop for start, stop in self.without_layout._intervals(query))

    def keys_needed(self, queries: Interval) -> tuple[Interval, ...]:
        """Disjoint ascending key intervals that hold every key seen by any query of the interval."""
        first, stop = queries
        if first >= stop:
            return ()
        if self.layout is not None:
            return normalize(interval for piece in self._pieces(first, stop) for interval in piece)
        sink, (start, _) = self._intervals(first)
        needed = (sink, (start, self.key_interval(stop - 1)[1]))
        return tuple(interval for interval in needed if interval[0] < interval[1])

    def _intervals(self, query: int) -> tuple[Interval, Interval]:
        """Sink interval and key interval of a query; `position` is the query's place among the keys."""
        index = self.document_of(query)
        if index is None:
            assert self.boundaries is not None  # without any there is one document
            nothing = (self.boundaries[-1],) * 2
            return nothing, nothing
        begin, end = (0, UNBOUNDED) if self.boundaries is None else self.boundaries[index : index + 2]
        position = query if self.query_boundaries is None else query - self.query_boundaries[index + 1] + end
        start, stop, sink_start, sink_end = begin, end, begin, begin + self.sink
        if self.branches is not None:
            (sink_start, sink_end), (own_start, own_stop) = self.branches.around(position)
            start, stop, sink_start = max(start, own_start), min(stop, own_stop), max(begin, sink_start)
        if self.right is not None:
            stop = min(stop, position + self.right + 1)
        if self.spans is not None:
            stop = min(stop, stop_of(position, self.spans))
        if self.prefix is not None:
            prefix = self.prefix if isinstance(self.prefix, int) else self.prefix[index]
            stop = min(stop, max(position + 1, begin + prefix))
        for size in self.chunks:
            chunk = begin + (position - begin) // size * size
            start, stop = max(start, chunk), min(stop, chunk + size)
        if self.left is not None:
            start = max(start, position - self.left)
        if self.layout is not None:
            row = self.layout.row_of(query - self._origins(query)[0])
            first, last = (begin + bounds[row] for bounds in self.layout.bounds)
            # The layout may reach beyond the document; the next one must not start before this one does.
            start, stop = max(start, min(first, end)), min(stop, last)
            sink_start, sink_end = max(sink_start, min(first, end)), min(sink_end, stop)
        if self.branches is None:
            sink_start = start
        if self.sink_left is not None:
            start = max(start, position - self.sink_left)
        sink_stop = min(sink_end, start)
        if self.branches is None or self.query_boundaries is not None:  # places step back between documents
            sink_stop = max(sink_start, sink_stop)
        return (sink_start, sink_stop), (start, max(start, stop))

    # Blocks

    @cached_property
    def without_layout(self) -> Mask:
        """What the other rules show."""
        return replace(self, layout=None, routed=None) if self.has_layout else self

    def _origins(self, query: int) -> tuple[int, int]:
        """Where the document of a query position begins among the queries and among the keys."""
        if self.boundaries is None:
            return 0, 0
        index = self.document_of(query)
        assert index is not None
        return (self.query_boundaries or self.boundaries)[index], self.boundaries[index]

    def _pieces(self, first: int, stop: int) -> Iterator[Segments]:
        """Keys that queries [first, stop) need, for as many of them at a time as share a row of the layout."""
        assert self.layout is not None
        while first < stop:
            document = self.document_of(first)
            if document is None:
                return
            query_begin, key_begin = self._origins(first)
            row = self.layout.row_of(first - query_begin)
            bounds = self.query_boundaries or self.boundaries
            end = stop if bounds is None else min(stop, bounds[document + 1])
            end = min(end, query_begin + (row + 1) * self.layout.size)
            runs = tuple((key_begin + a, key_begin + b) for a, b in self.layout.rows[row])
            yield intersect(self.without_layout.keys_needed((first, end)), runs)
            first = end


_ALL_FIELDS = operator.attrgetter(*(field.name for field in fields(Mask)))


def _constant(value: int | tuple[int, ...]) -> int | list[int]:
    """Numbers as they are; torch.compile, which may take one that changes from call to call as unknown, pins it."""
    return [operator.index(x) for x in value] if isinstance(value, tuple) else operator.index(value)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _least_prefix(a: int | tuple[int, ...] | None, b: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    lengths = len(a) if isinstance(a, tuple) else len(b) if isinstance(b, tuple) else 0
    spread = [x if isinstance(x, tuple) else (x,) * lengths for x in (a, b)]
    if len(spread[0]) != len(spread[1]):
        raise ArgumentError(f"cannot intersect prefixes for {len(spread[0])} and {len(spread[1])} documents")
    return tuple(min(pair) for pair in zip(*spread, strict=True))
