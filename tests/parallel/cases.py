"""Masks, partitions, inputs and the dense float64 oracle that the tests of partitions, plans and rings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, resolve


def blocks(queries: int, keys: int, size: int | tuple[int, int], seed: int, share: float = 0.4) -> Mask:
    """A random layout of blocks that reaches over so many queries and keys and shows about a share of them."""
    sizes = (size, size) if isinstance(size, int) else size
    shape = (-(-queries // sizes[0]), -(-keys // sizes[1]))
    return Mask.blocks(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share, size)


def masks(length: int) -> dict[str, Mask]:
    """One mask of every kind, and compositions, for a sequence of `length` tokens."""
    third = length // 3
    documents = Mask.documents(sorted([0, length // 7, third, third, min(third + 1, length), 4 * length // 5, length]))
    spans = [(length // 9, length // 4), (length // 4, third), (length // 2, length - 1)]
    eighth = length // 8
    prompts, branches = [third, eighth // 2], [[eighth, 0, eighth + 1], [1]]
    branches[1].append(length - sum(prompts) - sum(map(sum, branches)))
    shared = Mask.shared_prefix(prompts, branches)
    return {
        "causal": Mask.causal(),
        "bidirectional": Mask.bidirectional(),
        "window": Mask.sliding_window(length // 5),
        "window-both-sides": Mask.sliding_window(3, 5),
        "window-sink": Mask.sliding_window(max(1, length // 9), sink=4),
        "documents": documents,
        "documents-causal": Mask.causal() & documents,
        "documents-window-sink": Mask.sliding_window(max(1, length // 12), sink=2) & documents,
        "chunked": Mask.chunked(max(1, length // 4 - 1)),
        "chunked-causal-documents": Mask.chunked(5) & Mask.causal() & documents,
        "prefix": Mask.prefix_lm(third),
        "prefix-each-document": Mask.prefix_lm([3, 0, 2, 1, 7, 1]) & documents,
        "prefix-window": Mask.prefix_lm(third) & Mask.sliding_window(length // 2, None),
        "spans": Mask.causal(spans),
        "spans-documents-window": Mask.causal(spans) & documents & Mask.sliding_window(length // 6, None),
        "shared-prefix": shared,
        "shared-prefix-spans": Mask.shared_prefix(prompts, branches, spans),
        "shared-prefix-documents-blocks": shared & documents & blocks(length, length, 6, seed=5, share=0.6),
        "blocks": blocks(length, length, 7, seed=1),
        "blocks-small": blocks(length, length, 2, seed=4, share=0.12),
        "blocks-causal-documents": blocks(length, length, (3, 8), seed=2) & Mask.causal() & documents,
        "blocks-window-sink": blocks(length, length, 5, seed=3) & Mask.sliding_window(max(1, length // 3), 2, sink=4),
    }


MASKS = tuple(masks(60))
PARTITIONS = ("contiguous", "zigzag", "balanced")
OTHERS = ("stripe", "contiguous_per_document", "zigzag_per_document")
"""Partitions of other libraries, which properties draw as well."""


@st.composite
def any_mask(draw: st.DrawFn, length: int) -> Mask:
    """Any composition of rules for `length` tokens."""
    near = st.integers(0, max(1, length // 2))
    kinds = [st.sampled_from([Mask.bidirectional(), Mask.causal()]), any_spans(length), any_shared_prefix(length)]
    mask = draw(draw(st.sampled_from([kinds[0], *kinds])))
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, length), max_size=8))
        mask &= Mask.documents([0, *sorted(cuts), length])
    if draw(st.booleans()):
        left = None if mask.branches else draw(st.none() | near)
        right = None if mask.spans is not None else draw(st.none() | near)
        mask &= Mask.sliding_window(left, right, sink=draw(st.integers(0, 6)))
    if not mask.branches and draw(st.integers(0, 3)) == 0:
        mask &= Mask.chunked(draw(st.integers(1, length)))
    if draw(st.integers(0, 3)) == 0:
        mask &= Mask.prefix_lm(draw(near))
    if draw(st.integers(0, 3)) == 0:
        mask &= draw(any_blocks(length))
    return mask


def span_lists(length: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ascending spans apart from each other below `length`, of which some touch."""
    edges = st.lists(st.integers(0, length), unique=True, max_size=8).map(sorted)
    pieces = edges.flatmap(lambda x: st.tuples(st.just(list(pairwise(x))), st.lists(st.booleans(), min_size=len(x))))
    return pieces.map(lambda x: [piece for piece, taken in zip(*x, strict=False) if taken])


def any_spans(length: int) -> st.SearchStrategy[Mask]:
    """A causal mask with any spans."""
    return span_lists(length).map(Mask.causal)


@st.composite
def group_lists(draw: st.DrawFn, length: int) -> list[tuple[int, ...]]:
    """The tokens of any prompts, each with those of its branches, `length` together."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=9)))
    pieces = [stop - start for start, stop in pairwise([0, *cuts, length])]
    firsts = sorted({0, *draw(st.lists(st.integers(0, len(pieces) - 1), max_size=3))})
    return [tuple(pieces[first:behind]) for first, behind in pairwise([*firsts, len(pieces)])]


@st.composite
def any_shared_prefix(draw: st.DrawFn, length: int) -> Mask:
    """Any groups of `length` tokens, half of them with spans."""
    prompts, branches = zip(*((prompt, lengths) for prompt, *lengths in draw(group_lists(length))), strict=True)
    return Mask.shared_prefix(prompts, branches, draw(st.just([]) | span_lists(length)))


@st.composite
def any_blocks(draw: st.DrawFn, length: int) -> Mask:
    """Any layout of at most 12 x 12 blocks or so that reaches over `length` queries and keys."""
    sizes = st.integers(max(1, length // 12), max(1, length))
    layout = (draw(sizes), draw(sizes)), draw(st.integers(0, 2**20)), draw(st.sampled_from([0.15, 0.5, 0.85]))
    return blocks(max(1, length), max(1, length), *layout)


@st.composite
def problems(draw: st.DrawFn, longest: int, most_ranks: int) -> tuple[Mask, Partition]:
    """Any mask, and any partition of its queries and keys."""
    length, ranks = draw(st.integers(1, longest)), draw(st.integers(1, most_ranks))
    mask = draw(any_mask(length))
    kind = draw(st.sampled_from([*PARTITIONS, *OTHERS, "random"]))
    return mask, draw(any_partition(length, ranks)) if kind == "random" else resolve(kind, length, ranks, mask)


@st.composite
def any_partition(draw: st.DrawFn, length: int, ranks: int) -> Partition:
    """Any pieces of `length` positions on any rank; some ranks may hold nothing."""
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3 * ranks))})
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    pieces = list(pairwise(cuts))
    shares = (tuple(p for p, owner in zip(pieces, owners, strict=True) if owner == rank) for rank in range(ranks))
    return Partition(length, tuple(shares))


def visible(mask: Mask, queries: int, keys: int | None = None) -> Tensor:
    """Dense (query, key) matrix of a mask, from the intervals that define it; as many keys as queries if None."""
    keys = queries if keys is None else keys
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for layer in mask.layers:
        for query in range(queries):
            for start, stop in (layer.sink_interval(query), layer.key_interval(query)):
                seen[query, start : min(stop, keys)] = True
    return seen


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention problem: batch, tokens, query heads, key heads, head dimension."""

    batch: int = 1
    length: int = 61
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global q, k, v and the gradient of out, (B, S, H or Hk, D), the same wherever they are made."""
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    sizes = ((shape.batch, shape.length, count, shape.head_dim) for count in heads)
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def visible_in_batch(mask: Mask, batch: int, length: int) -> Tensor:
    """`visible` over the B * S tokens of a batch laid end to end, where each sequence is a document of its own."""
    return visible(mask & Mask.documents(range(0, batch * length + 1, length)), batch * length)


RESULTS = ("out", "dq", "dk", "dv")


def exact(tensors: Sequence[Tensor], seen: Tensor, scale: float | None = None) -> dict[str, Tensor]:
    """Attention and its gradients by definition in float64; seen is (B * S, B * S)."""
    return _differentiate(_attention_by_definition, tuple(x.double() for x in tensors), seen, scale)


def torchs_own(tensors: Sequence[Tensor], seen: Tensor, scale: float | None = None) -> dict[str, Tensor]:
    """The same by torch's scaled_dot_product_attention in the dtype of the inputs: the yardstick for errors."""
    return _differentiate(_torch_attention, tuple(tensors), seen, scale)


def log_sum_exp(query: Tensor, key: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """(B, H, S) float64 by definition."""
    scores = _scores(query.double().flatten(0, 1), key.double().flatten(0, 1), seen, scale)
    return scores.logsumexp(-1).unflatten(1, query.shape[:2]).transpose(0, 1)


def errors(results: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of out and of each gradient."""
    for name in RESULTS:
        assert results[name].shape == oracle[name].shape, name
    return {name: (results[name].double() - oracle[name]).abs().max().item() for name in RESULTS}


def assert_as_exact_as_torch(
    results: dict[str, Tensor], tensors: Sequence[Tensor], seen: Tensor, scale: float | None = None
) -> None:
    """At most twice the error of torch's own attention in the same dtype against float64, plus 1e-5."""
    oracle = exact(tensors, seen, scale)
    found = errors(results, oracle)
    allowed = {name: 2 * error + 1e-5 for name, error in errors(torchs_own(tensors, seen, scale), oracle).items()}
    bad = [name for name in RESULTS if not found[name] <= allowed[name]]  # a NaN is an error too
    assert not bad, f"{bad}: errors {found}, allowed {allowed}"


def _differentiate(attention: Callable, tensors: tuple[Tensor, ...], seen: Tensor, scale: float | None) -> dict:
    *leaves, dout = (x.detach().clone() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = attention(*(x.flatten(0, 1) for x in leaves), seen, scale).unflatten(0, dout.shape[:2])
    gradients = torch.autograd.grad(out, leaves, dout)
    return dict(zip(RESULTS, (out.detach(), *gradients), strict=True))


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf)


def _attention_by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    v, blind = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), ~seen.any(1)[:, None]
    weights = _scores(q, k, seen | blind, scale).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).masked_fill(blind[..., None], 0)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attention, blind = torch.nn.functional.scaled_dot_product_attention, ~seen.any(1)[:, None]
    # torch promises nothing for rows without keys: show all, and take no notice of them.
    out = attention(q, k, v, attn_mask=seen | blind, scale=scale, enable_gqa=True)[0]
    return out.transpose(0, 1).masked_fill(blind[..., None], 0)
