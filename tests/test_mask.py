"""Every mask against a definition of its own, pair by pair, written from what the constructors promise."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from operator import and_

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.mask import Mask


@dataclass(frozen=True)
class Document:
    """Where a query stands: `query` counts among the keys, of which [begin, end) are its document's, `own` in it."""

    index: int
    begin: int
    end: int
    query: int
    own: int


@dataclass(frozen=True)
class Rule:
    """One constructor call."""

    name: str
    arguments: tuple

    def mask(self) -> Mask:
        return getattr(Mask, self.name)(*self.arguments)

    def allows(self, key: int, document: Document) -> bool:
        query, begin = document.query, document.begin
        if self.name == "causal":
            (spans,) = self.arguments or ((),)
            return key <= query or any(a <= query < key < b for a, b in spans)
        if self.name == "shared_prefix":
            prompts, branches, spans = self.arguments
            mine, its = (piece_of(x, prompts, branches) for x in (query, key))
            same = mine is not None and its is not None and mine[0] == its[0] and its[1] in (0, mine[1])
            return same and Rule("causal", (spans,)).allows(key, document)
        if self.name == "sliding_window":
            left, right, sink = self.arguments
            near = left is None or key >= query - left or key < begin + sink
            return near and (right is None or key <= query + right)
        if self.name == "chunked":
            (size,) = self.arguments
            return (key - begin) // size == (query - begin) // size
        if self.name == "prefix_lm":
            (length,) = self.arguments
            length = length if isinstance(length, int) else length[document.index]
            return key <= query or max(key, query) < begin + length
        if self.name == "blocks":
            layout, (of_queries, of_keys) = self.arguments
            return layout[document.own // of_queries][(key - begin) // of_keys]
        return True  # bidirectional; documents are in `document`


def piece_of(position: int, prompts: list[int], branches: list[list[int]]) -> tuple[int, int] | None:
    """Number of the group that holds a position, and of its branch from 1 on, 0 for the prompt; None for no group."""
    for group, lengths in enumerate([prompt, *rest] for prompt, rest in zip(prompts, branches, strict=True)):
        for piece, tokens in enumerate(lengths):
            if 0 <= position < tokens:
                return group, piece
            position -= tokens
    return None


def document_of(query: int, rules: list[Rule], total: int) -> Document:
    """The document of a query, cut by every `documents` rule; index counts in the only rule, if it is one."""
    index, begin, end, position, first = 0, 0, total, query, 0
    alike = all(len(rule.arguments) == 1 for rule in rules if rule.name == "documents")
    for rule in rules:
        if rule.name == "documents":
            keys, queries = rule.arguments if len(rule.arguments) == 2 else rule.arguments * 2
            index = bisect_right(queries, query) - 1
            begin, end = max(begin, keys[index]), min(end, keys[index + 1])
            position = query - queries[index + 1] + keys[index + 1]
            first = max(first, queries[index])
        if rule.name == "shared_prefix" and alike:  # each group is a document
            edges = [0, *accumulate(p + sum(b) for p, b in zip(*rule.arguments[:2], strict=True))]
            group = bisect_right(edges, query) - 1
            begin, end, first = max(begin, edges[group]), min(end, edges[group + 1]), max(first, edges[group])
    return Document(index, begin, end, position, query - first)


def seen(query: int, rules: list[Rule], total: int) -> set[int]:
    document = document_of(query, rules, total)
    return {key for key in range(document.begin, document.end) if all(rule.allows(key, document) for rule in rules)}


def composed(rules: list[Rule]) -> Mask:
    return reduce(and_, (rule.mask() for rule in rules), Mask.bidirectional())


@st.composite
def block_rules(draw: st.DrawFn, queries: int, keys: int) -> Rule:
    """Any layout of at most 8 x 8 blocks that reaches over so many queries and keys, or further."""
    sizes = [draw(st.integers(max(1, -(-n // 8)), n + 2)) for n in (queries, keys)]
    height, width = (-(-n // size) for n, size in zip((queries, keys), sizes, strict=True))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    return Rule("blocks", (draw(st.lists(row, min_size=height, max_size=height)), tuple(sizes)))


def any_spans(total: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ascending, apart, some of them touching."""
    edges = st.lists(st.integers(0, total), unique=True, max_size=8).map(sorted)
    touching = edges.map(lambda x: list(pairwise(x)))
    return touching | edges.map(lambda x: list(zip(x[:-1:2], x[1::2], strict=True)))


@st.composite
def shared_prefix_rules(draw: st.DrawFn, total: int) -> Rule:
    """Any prompts and branches of so many tokens together."""
    prompts, branches, left = [], [], total
    for _ in range(draw(st.integers(0, 2))):
        lengths = []
        for _ in range(draw(st.integers(1, 4))):
            lengths.append(draw(st.integers(0, left)))
            left -= lengths[-1]
        prompts.append(lengths[0])
        branches.append(lengths[1:])
    return Rule("shared_prefix", ([*prompts, 0], [*branches, [left]], draw(st.just([]) | any_spans(total))))


@st.composite
def rule_lists(draw: st.DrawFn, total: int, sinks: bool = True, layouts: int = 0) -> list[Rule]:
    """Any rules that compose: sinks of one size, and prefixes of one document each only with one cut into documents.

    Beside spans there is no bound to the right, beside a shared prefix neither a window to the left nor chunks.

    With as many layouts of blocks as asked for.
    """
    near = st.integers(0, total)
    spans = any_spans(total).map(lambda spans: Rule("causal", (spans,)))
    plain = st.sampled_from([Rule("causal", ()), Rule("bidirectional", ())])
    base = draw(plain | spans | shared_prefix_rules(total))
    rules, of_base, sink = [base], base.mask(), draw(st.integers(0, 5)) if sinks else 0
    lefts = st.none() if of_base.branches else st.none() | near
    rights = st.none() if of_base.spans else st.none() | near
    for _ in range(draw(st.integers(0, 2))):
        rules.append(Rule("sliding_window", (draw(lefts), draw(rights), draw(st.sampled_from([0, sink])))))
    for _ in range(0 if of_base.branches else draw(st.integers(0, 2))):
        rules.append(Rule("chunked", (draw(st.integers(1, total)),)))
    for _ in range(draw(st.integers(0, 2))):
        rules.append(Rule("prefix_lm", (draw(near),)))
    rules += [draw(block_rules(total, total)) for _ in range(layouts)]
    documents = [sorted([0, *draw(st.lists(near, max_size=5)), total]) for _ in range(draw(st.integers(0, 2)))]
    rules += [Rule("documents", (tuple(bounds),)) for bounds in documents]
    if len(documents) == 1 and not of_base.branches and draw(st.booleans()):
        count = len(documents[0]) - 1
        rules.append(Rule("prefix_lm", (tuple(draw(st.lists(near, min_size=count, max_size=count))),)))
    return draw(st.permutations(rules))


def shown(mask: Mask, query: int, total: int) -> set[int]:
    return {key for key in range(total) if mask.sees(query, key)}


@settings(max_examples=300)
@given(st.data(), st.integers(1, 40), st.sampled_from([0, 0, 1, 2]))
def test_a_composition_shows_what_all_of_its_rules_allow(data: st.DataObject, total: int, layouts: int) -> None:
    rules = data.draw(rule_lists(total, layouts=layouts))
    mask = composed(rules)
    for query in range(total):
        assert shown(mask, query, total) == seen(query, rules, total)


@settings(max_examples=200)
@given(st.data(), st.integers(1, 40))
def test_intervals_are_disjoint_and_never_step_back(data: st.DataObject, total: int) -> None:
    mask = composed(data.draw(rule_lists(total)))
    before = (0, 0, 0, 0)
    for query in range(total):
        (sink_start, sink_stop), (start, stop) = mask.sink_interval(query), mask.key_interval(query)
        assert max(sink_start, sink_stop) <= start <= query < stop
        now = (sink_start, sink_stop, start, stop)
        assert all(x <= y for x, y in zip(before, now, strict=True))
        before = now


@settings(max_examples=300)
@given(st.data(), st.integers(1, 10), st.booleans())
def test_queries_of_another_length_stand_at_the_end_of_their_document(
    data: st.DataObject, count: int, causal: bool
) -> None:
    steps = st.lists(st.integers(0, 7), min_size=count, max_size=count)
    keys, queries = (
        (0, *(sum(lengths[: i + 1]) for i in range(count))) for lengths in (data.draw(steps), data.draw(steps))
    )
    rules = [Rule("documents", (keys, queries)), Rule("causal" if causal else "bidirectional", ())]
    near = st.integers(0, 9)
    extra = st.sampled_from(["sliding_window", "chunked", "prefix_lm"])
    for name in data.draw(st.lists(extra, unique=True)):
        arguments = {
            "sliding_window": (data.draw(near), data.draw(st.none() | near), data.draw(st.integers(0, 3))),
            "chunked": (1 + data.draw(near),),
            "prefix_lm": (data.draw(near),),
        }
        rules.append(Rule(name, arguments[name]))
    mask = composed(rules)
    for query in range(queries[-1]):
        assert shown(mask, query, keys[-1]) == seen(query, rules, keys[-1])
    for edges in zip(*((*mask.sink_interval(q), *mask.key_interval(q)) for q in range(queries[-1])), strict=True):
        assert list(edges) == sorted(edges)


@settings(max_examples=200)
@given(st.data(), st.integers(1, 6))
def test_so_they_do_beside_spans_and_a_shared_prefix_of_the_keys(data: st.DataObject, count: int) -> None:
    steps = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    keys, queries = (
        (0, *(sum(lengths[: i + 1]) for i in range(count))) for lengths in (data.draw(steps), data.draw(steps))
    )
    documents = Rule("documents", (keys, queries))
    rule = data.draw(shared_prefix_rules(keys[-1]) | any_spans(keys[-1]).map(lambda x: Rule("causal", (x,))))
    mask = documents.mask() & rule.mask().without_documents()
    for query in range(queries[-1]):
        assert shown(mask, query, keys[-1]) == seen(query, [documents, rule], keys[-1])
    assert_never_steps_back(mask, queries[-1])


@settings(max_examples=200)
@given(st.data(), st.integers(1, 40))
def test_intersected_spans_show_what_both_show(data: st.DataObject, total: int) -> None:
    rules = [Rule("causal", (data.draw(any_spans(total).filter(bool)),)) for _ in range(2)]
    mask = composed(rules)
    for query in range(total):
        assert shown(mask, query, total) == seen(query, rules, total)


def keys_of_layers(mask: Mask, query: int, total: int) -> list[int]:
    """The keys that any layer shows, as often as one does."""
    intervals = [x for layer in mask.layers for x in (layer.sink_interval(query), layer.key_interval(query))]
    return sorted(key for start, stop in intervals for key in range(start, min(stop, total)))


def assert_never_steps_back(layer: Mask, queries: int) -> None:
    """The ends of both intervals, the sinks' before the other's, as kernels rely on them."""
    bounds = [(*layer.sink_interval(query), *layer.key_interval(query)) for query in range(queries)]
    for sink_start, sink_stop, start, stop in bounds:
        assert max(sink_start, sink_stop) <= start <= stop
    for edges in zip(*bounds, strict=True):
        assert list(edges) == sorted(edges)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 40), st.sampled_from([1, 1, 2]))
def test_layers_of_blocks_are_interval_masks_that_show_each_pair_once(
    data: st.DataObject, total: int, layouts: int
) -> None:
    rules = data.draw(rule_lists(total, layouts=layouts))
    mask = composed(rules)
    for layer in mask.layers:
        assert layer.layers == (layer,)
        assert_never_steps_back(layer, total)
    for query in range(total):
        assert keys_of_layers(mask, query, total) == sorted(seen(query, rules, total))


@settings(max_examples=200)
@given(st.data(), st.integers(1, 6), st.booleans())
def test_blocks_count_queries_and_keys_from_the_start_of_each_document(
    data: st.DataObject, count: int, causal: bool
) -> None:
    steps = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    keys, queries = (
        (0, *(sum(lengths[: i + 1]) for i in range(count))) for lengths in (data.draw(steps), data.draw(steps))
    )
    rules = [Rule("documents", (keys, queries)), Rule("causal" if causal else "bidirectional", ())]
    rules.append(data.draw(block_rules(9, 9)))
    mask = composed(rules)
    for layer in mask.layers:
        assert_never_steps_back(layer, queries[-1])
    for query in range(queries[-1]):
        assert shown(mask, query, keys[-1]) == seen(query, rules, keys[-1])
        assert keys_of_layers(mask, query, keys[-1]) == sorted(seen(query, rules, keys[-1]))


def layers(layout: torch.Tensor) -> int:
    return len(Mask.blocks(layout.bool(), 4).layers)


def test_regular_layouts_have_few_layers() -> None:
    row, column = torch.arange(32)[:, None], torch.arange(32)[None, :]
    window = (column <= row) & (column >= row - 3)
    assert layers(window) == layers(row >= column) == layers(row // 4 == column // 4) == 1
    assert layers((row - column) % 8 == 0) == 7  # diagonals, of which those above and below 0 share none
    assert layers(window | ((column % 8 == 0) & (column <= row))) == 5  # the window and four stripes
    assert layers(window | (row == 0) | (column == 0)) == 3  # the window, a row, and a column below it
    assert layers(torch.zeros(3, 4)) == 1


def test_blocks_that_a_bound_hides_cost_no_layer() -> None:
    row, column = torch.arange(32)[:, None], torch.arange(32)[None, :]
    window = Mask.blocks((column <= row + 8) & (column % 2 == 0), 4) & Mask.sliding_window(3)
    assert len(window.layers) > 1
    assert len((window & Mask.documents([0, 128])).layers) == 1
    assert (window & Mask.documents([0, 128], [0, 64])).layers != (window & Mask.documents([0, 64])).layers


@settings(max_examples=200)
@given(st.data(), st.integers(1, 30))
def test_keys_needed_hold_every_key_that_is_seen(data: st.DataObject, total: int) -> None:
    rules = data.draw(rule_lists(total, layouts=data.draw(st.sampled_from([0, 0, 1]))))
    mask = composed(rules)
    first, stop = sorted(data.draw(st.tuples(*[st.integers(0, total)] * 2)))
    needed = [(start, min(end, total)) for start, end in mask.keys_needed((first, stop))]  # may be unbounded
    flat = [edge for interval in needed for edge in interval]
    assert flat == sorted(flat)
    assert all(start < end for start, end in needed)
    union = set().union(*(seen(query, rules, total) for query in range(first, stop)))
    assert union <= {key for interval in needed for key in range(*interval)}
    if union and not mask.two_intervals and not mask.layout:
        assert (flat[0], flat[-1]) == (min(union), max(union) + 1)


@given(st.data(), st.integers(1, 30))
def test_intersection_has_the_laws_of_one(data: st.DataObject, total: int) -> None:
    rules = data.draw(rule_lists(total, sinks=False, layouts=data.draw(st.integers(0, 2))))
    middle = data.draw(st.integers(0, len(rules)))
    whole, a, b = (composed(part) for part in (rules, rules[:middle], rules[middle:]))
    assert whole & whole == whole
    assert whole & Mask.bidirectional() == whole
    for other in (a & b, b & a):
        assert all(shown(other, query, total) == shown(whole, query, total) for query in range(total))


@given(st.data(), st.integers(1, 30))
def test_text_form_keeps_everything(data: st.DataObject, total: int) -> None:
    mask = composed(data.draw(rule_lists(total, layouts=data.draw(st.integers(0, 2)))))
    assert Mask.from_spec(mask.spec()) == mask
    assert Mask.from_spec(mask.spec(documents=False)) == mask.without_documents()
    assert mask.without_documents().boundaries is None


@given(st.data(), st.integers(1, 20), st.integers(1, 9))
def test_tokens_behind_the_last_document_see_nothing_and_nobody_sees_them(
    data: st.DataObject, total: int, tail: int
) -> None:
    rules = data.draw(rule_lists(total, layouts=data.draw(st.integers(0, 1))))
    mask = composed(rules) & Mask.documents([0, total])
    assert all(mask.keys_needed((query, query + 1)) == () for query in range(total, total + tail))
    assert not any(mask.sees(query, key) for query in range(total, total + tail) for key in range(total + tail))
    assert not any(mask.sees(query, key) for query in range(total) for key in range(total, total + tail))


def test_no_queries_need_no_keys() -> None:
    assert Mask.causal().keys_needed((4, 4)) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask.sliding_window(-1), "left=-1"),
        (lambda: Mask.sliding_window(3, -2), "right=-2"),
        (lambda: Mask.sliding_window(3, 0, -4), "sink=-4"),
        (lambda: Mask.sliding_window(3.0), r"left=3\.0; allowed are integers"),
        (lambda: Mask.documents([0]), r"cu_seqlens=\(0,\)"),
        (lambda: Mask.documents([1, 5]), r"cu_seqlens=\(1, 5\)"),
        (lambda: Mask.documents([0, 5, 4]), r"cu_seqlens=\(0, 5, 4\)"),
        (lambda: Mask.documents([0, 5], [0, 2, 4]), "query_cu_seqlens has 3 boundaries, cu_seqlens 2"),
        (lambda: Mask.documents([0, 5], [1, 4]), r"query_cu_seqlens=\(1, 4\)"),
        (lambda: Mask.chunked(0), "size=0"),
        (lambda: Mask.chunked(8.0), r"size=8\.0; allowed are integers"),
        (lambda: Mask.documents([0, 2.5, 4]), r"cu_seqlens=\[0, 2\.5, 4\]; allowed are integers"),
        (lambda: Mask.prefix_lm(1.5), r"prefix_lm: length=1\.5; allowed are integers"),
        (lambda: Mask.prefix_lm([1.5]), r"prefix_lm: length=\[1\.5\]; allowed are integers"),
        (lambda: Mask.prefix_lm(-1), "length=-1"),
        (lambda: Mask.prefix_lm([2, -1]), r"length=\[2, -1\]"),
        (lambda: Mask.prefix_lm([1, 2]) & Mask.documents([0, 9]), "2 lengths for 1 documents"),
        (lambda: Mask.prefix_lm([1, 2, 9]) & Mask.documents([0, 5, 5, 9]) & Mask.documents([0, 7, 9]), "3 lengths"),
        (lambda: Mask.documents([0, 7, 9]) & (Mask.prefix_lm([1, 2, 9]) & Mask.documents([0, 5, 5, 9])), "3 lengths"),
        (lambda: Mask.prefix_lm([1, 2]).sees(0, 1), "2 lengths, but there are no documents"),
        (lambda: Mask.prefix_lm([1, 2]) & Mask.prefix_lm([1, 2, 3]), "2 and 3 documents"),
        (lambda: Mask.sliding_window(9, sink=1) & Mask.sliding_window(9, sink=2), "different sinks: 1 and 2"),
        (lambda: Mask.documents([0, 4]) & Mask.documents([0, 5]), "end at 4 and at 5"),
        (lambda: Mask.causal([(3, 2)]), r"spans=\[\(3, 2\)\]; allowed are pairs"),
        (lambda: Mask.causal([(0, 2, 3)]), r"spans=\[\(0, 2, 3\)\]"),
        (lambda: Mask.causal([(-1, 2)]), r"spans=\[\(-1, 2\)\]"),
        (lambda: Mask.causal([(4, 7), (0, 2)]), r"spans=.*ascending order"),
        (lambda: Mask.causal([(0, 2), (1, 4)]), r"spans=.*apart"),
        (lambda: Mask.causal([(0, 2.5)]), r"spans=\(0, 2\.5\); allowed are integers"),
        (lambda: Mask.causal([(0, 2)]) & Mask.causal(), "cannot intersect spans with a bound right=0"),
        (lambda: Mask.sliding_window(9) & Mask.causal([(0, 2)]), "cannot intersect spans with a bound right=0"),
        (lambda: Mask.shared_prefix([1, 2], [[3]]), "2 prompts and the branches of 1"),
        (lambda: Mask.shared_prefix([], []), "0 prompts"),
        (lambda: Mask.shared_prefix([2], [[3, -1]]), r"prompt of 2 with branches of \[3, -1\]"),
        (lambda: Mask.shared_prefix([2.5], [[3]]), r"prompts=\[2\.5\]; allowed are integers"),
        (lambda: Mask.shared_prefix([2], [[1.5]]), r"branches\[0\]=\[1\.5\]; allowed are integers"),
        (
            lambda: Mask.shared_prefix([2], [[3, 4]]) & Mask.sliding_window(3),
            "shared_prefix with sliding_window: left=3",
        ),
        (
            lambda: Mask.sliding_window(3, sink=1) & Mask.shared_prefix([2], [[3, 4]]),
            "shared_prefix with sliding_window",
        ),
        (lambda: Mask.chunked(3) & Mask.shared_prefix([2], [[3, 4]]), "shared_prefix with chunked: size=3"),
        (lambda: Mask.shared_prefix([2], [[3]]) & Mask.shared_prefix([1], [[4]]), "shared prefixes of differing"),
        (lambda: Mask.shared_prefix([2], [[3]], [(0, 2)]) & Mask.causal(), "cannot intersect spans"),
        (lambda: Mask.documents([0, 4]).key_interval(-1), "position -1 lies before"),
        (lambda: Mask.blocks([[True]], 0), "block_size=0"),
        (lambda: Mask.blocks([[True]], (4, -1)), r"block_size=\(4, -1\)"),
        (lambda: Mask.blocks([[True]], (4, 4, 4)), r"block_size=\(4, 4, 4\)"),
        (lambda: Mask.blocks([[True]], 2.0), r"block_size=2\.0"),
        (lambda: Mask.blocks([], 4), "layout has no rows"),
        (lambda: Mask.blocks([True, False], 4), "layout has no rows"),
        (lambda: Mask.blocks(torch.ones(2, 0).bool(), 4), "layout has no rows"),
        (lambda: Mask.blocks([[True], [True, False]], 4), "rows of 1 and of 2 key blocks"),
        (lambda: Mask.blocks([[True, 1]], 4), "layout holds 1"),
        (lambda: Mask.blocks(torch.ones(2, 2), 4), r"layout holds 1\.0"),
        (lambda: Mask.blocks([[[True]]], 4), "or a tensor"),
        (lambda: Mask.blocks(torch.ones(3, 2, 2), 4), "layout is torch.float32"),
        (lambda: Mask.blocks([[True]], 4) & Mask.documents([0, 3, 8]), "reaches over 4 queries, .* has 5"),
        (lambda: Mask.blocks([[True]], (8, 4)) & Mask.documents([0, 3, 8]), "reaches over 4 keys, .* has 5"),
        (lambda: Mask.blocks([[True]], 4).sees(4, 0), "reaches over 4 queries"),
        (lambda: Mask.blocks([[True, False, True]], 4).key_interval(0), "ask each of its layers"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
