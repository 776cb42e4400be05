"""Every mask against a definition of its own, pair by pair, written from what the constructors promise."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import reduce
from operator import and_

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.errors import ArgumentError
from ringflash.mask import Mask, Visibility


@dataclass(frozen=True)
class Document:
    """Where a query stands: `query` counts among the keys, of which [begin, end) are its document's."""

    index: int
    begin: int
    end: int
    query: int


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
            return key <= query
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
        return True  # bidirectional; documents are in `document`


def document_of(query: int, rules: list[Rule], total: int) -> Document:
    """The document of a query, cut by every `documents` rule; index counts in the only rule, if it is one."""
    index, begin, end, position = 0, 0, total, query
    for rule in rules:
        if rule.name == "documents":
            keys, queries = rule.arguments if len(rule.arguments) == 2 else rule.arguments * 2
            index = bisect_right(queries, query) - 1
            begin, end = max(begin, keys[index]), min(end, keys[index + 1])
            position = query - queries[index + 1] + keys[index + 1]
    return Document(index, begin, end, position)


def seen(query: int, rules: list[Rule], total: int) -> set[int]:
    document = document_of(query, rules, total)
    return {key for key in range(document.begin, document.end) if all(rule.allows(key, document) for rule in rules)}


def composed(rules: list[Rule]) -> Mask:
    return reduce(and_, (rule.mask() for rule in rules), Mask.bidirectional())


@st.composite
def rule_lists(draw: st.DrawFn, total: int, sinks: bool = True) -> list[Rule]:
    """Any rules that compose: sinks of one size, and prefixes of one document each only with one cut into documents."""
    near = st.integers(0, total)
    rules = [Rule("causal", ())] if draw(st.booleans()) else [Rule("bidirectional", ())]
    sink = draw(st.integers(0, 5)) if sinks else 0
    for _ in range(draw(st.integers(0, 2))):
        rules.append(
            Rule("sliding_window", (draw(st.none() | near), draw(st.none() | near), draw(st.sampled_from([0, sink]))))
        )
    for _ in range(draw(st.integers(0, 2))):
        rules.append(Rule("chunked", (draw(st.integers(1, total)),)))
    for _ in range(draw(st.integers(0, 2))):
        rules.append(Rule("prefix_lm", (draw(near),)))
    documents = [sorted([0, *draw(st.lists(near, max_size=5)), total]) for _ in range(draw(st.integers(0, 2)))]
    rules += [Rule("documents", (tuple(bounds),)) for bounds in documents]
    if len(documents) == 1 and draw(st.booleans()):
        count = len(documents[0]) - 1
        rules.append(Rule("prefix_lm", (tuple(draw(st.lists(near, min_size=count, max_size=count))),)))
    return draw(st.permutations(rules))


def shown(mask: Mask, query: int, total: int) -> set[int]:
    return {key for key in range(total) if mask.sees(query, key)}


@settings(max_examples=300)
@given(st.data(), st.integers(1, 40))
def test_a_composition_shows_what_all_of_its_rules_allow(data: st.DataObject, total: int) -> None:
    rules = data.draw(rule_lists(total))
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
        assert sink_start <= sink_stop <= start <= query < stop
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


@settings(max_examples=300)
@given(st.data(), st.integers(1, 30), st.booleans())
def test_classify_is_sound_and_without_sinks_exact(data: st.DataObject, total: int, sinks: bool) -> None:
    rules = data.draw(rule_lists(total, sinks))
    mask = composed(rules)
    rows, columns = (sorted(data.draw(st.tuples(*[st.integers(0, total)] * 2))) for _ in range(2))
    pairs = [key in seen(query, rules, total) for query in range(*rows) for key in range(*columns)]
    exact = Visibility.EMPTY if not any(pairs) else Visibility.FULL if all(pairs) else Visibility.PARTIAL
    kind = mask.classify(tuple(rows), tuple(columns))
    if mask.sink:
        assert kind in (exact, Visibility.PARTIAL)
    else:
        assert kind is exact


@settings(max_examples=200)
@given(st.data(), st.integers(1, 30))
def test_keys_needed_hold_every_key_that_is_seen(data: st.DataObject, total: int) -> None:
    rules = data.draw(rule_lists(total))
    mask = composed(rules)
    first, stop = sorted(data.draw(st.tuples(*[st.integers(0, total)] * 2)))
    needed = [(start, min(end, total)) for start, end in mask.keys_needed((first, stop))]  # may be unbounded
    flat = [edge for interval in needed for edge in interval]
    assert flat == sorted(flat)
    assert all(start < end for start, end in needed)
    union = set().union(*(seen(query, rules, total) for query in range(first, stop)))
    assert union <= {key for interval in needed for key in range(*interval)}
    if union and not mask.sink:
        assert (flat[0], flat[-1]) == (min(union), max(union) + 1)


@given(st.data(), st.integers(1, 30))
def test_intersection_has_the_laws_of_one(data: st.DataObject, total: int) -> None:
    rules = data.draw(rule_lists(total, sinks=False))
    middle = data.draw(st.integers(0, len(rules)))
    whole, a, b = (composed(part) for part in (rules, rules[:middle], rules[middle:]))
    assert whole & whole == whole
    assert whole & Mask.bidirectional() == whole
    for other in (a & b, b & a):
        assert all(shown(other, query, total) == shown(whole, query, total) for query in range(total))


@given(st.data(), st.integers(1, 30))
def test_text_form_keeps_all_but_the_documents(data: st.DataObject, total: int) -> None:
    mask = composed(data.draw(rule_lists(total)))
    assert Mask.from_spec(mask.spec()) == mask.without_documents()
    assert mask.without_documents().boundaries is None


def test_rectangles_without_pairs_are_empty_and_need_no_keys() -> None:
    assert Mask.causal().classify((3, 3), (0, 5)) is Visibility.EMPTY
    assert Mask.causal().classify((0, 5), (2, 2)) is Visibility.EMPTY
    assert Mask.causal().keys_needed((4, 4)) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask.sliding_window(-1), "left=-1"),
        (lambda: Mask.sliding_window(3, -2), "right=-2"),
        (lambda: Mask.sliding_window(3, 0, -4), "sink=-4"),
        (lambda: Mask.documents([0]), r"cu_seqlens=\(0,\)"),
        (lambda: Mask.documents([1, 5]), r"cu_seqlens=\(1, 5\)"),
        (lambda: Mask.documents([0, 5, 4]), r"cu_seqlens=\(0, 5, 4\)"),
        (lambda: Mask.documents([0, 5], [0, 2, 4]), "query_cu_seqlens has 3 boundaries, cu_seqlens 2"),
        (lambda: Mask.documents([0, 5], [1, 4]), r"query_cu_seqlens=\(1, 4\)"),
        (lambda: Mask.chunked(0), "size=0"),
        (lambda: Mask.prefix_lm(-1), "length=-1"),
        (lambda: Mask.prefix_lm([2, -1]), r"length=\[2, -1\]"),
        (lambda: Mask.prefix_lm([1, 2]) & Mask.documents([0, 9]), "2 lengths for 1 documents"),
        (lambda: Mask.prefix_lm([1, 2]) & Mask.prefix_lm([1, 2, 3]), "2 and 3 documents"),
        (lambda: Mask.sliding_window(9, sink=1) & Mask.sliding_window(9, sink=2), "different sinks: 1 and 2"),
        (lambda: Mask.documents([0, 4]) & Mask.documents([0, 5]), "end at 4 and at 5"),
        (lambda: Mask.documents([0, 4]).key_interval(4), "position 4 lies outside"),
        (lambda: Mask.documents([0, 4]).key_interval(-1), "position -1 lies outside"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
