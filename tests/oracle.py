"""What every kernel is held against: float64 for truth, torch's own attention for how far off one may be.

    problem = draw_problem(intervals, heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16)
    assert_accurate(run(blockwise, problem), problem)

There is one tolerance, in `assert_accurate`.

Legend: T query rows, S key rows, H query heads, Hk key heads, D head dimension, Dv value's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from types import ModuleType

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ringflash.kernels import reference
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.key_blocks import KeyBlocks, unit_of
from ringflash.kernels.modifiers import Modifiers, keep_mask
from ringflash.parallel.positions.mask import Mask

LAYOUTS = ("plain", "heads first", "part of wider rows", "one row for all")


@dataclass(frozen=True, repr=False)
class Problem:
    """Inputs of attention and the gradients that reach its results."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    dlse: Tensor
    intervals: KeyIntervals
    scale: float
    modifiers: Modifiers | None = None

    def visible(self) -> Tensor:
        """(T, S) pairs that mask and padding show; with blocks (H, T, S)."""
        padding = None if self.modifiers is None else self.modifiers.key_visible
        shown = self.intervals.visible()
        if shown.dim() == 3:
            shown = shown.repeat_interleave(self.query.shape[1] // len(shown), dim=0)
        return shown if padding is None else shown & (padding != 0)

    def __repr__(self) -> str:
        """Shapes and bounds only: what a failing example has to show."""
        tensors = ", ".join(
            f"{x.name} {tuple(t.shape)} strides {t.stride()}"
            for x in fields(self)
            if isinstance(t := getattr(self, x.name), Tensor)
        )
        bounds = [bound.tolist() for pair in self.intervals.ranges() for bound in pair]
        return f"Problem({self.query.dtype}, {tensors}, scale {self.scale}, {self.modifiers}, bounds {bounds})"


@dataclass(frozen=True)
class Results:
    out: Tensor
    lse: Tensor
    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor


def draw_problem(
    intervals: KeyIntervals,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    seed: int = 0,
    layout: str = "plain",
    scale: float | None = None,
    modifiers: Modifiers | None = None,
) -> Problem:
    """A random problem on the intervals' device; gradients are zero for rows without keys."""
    (query_heads, key_heads), (dim, value_dim) = heads, dims
    device = intervals.start.device
    random = torch.Generator(device).manual_seed(seed)

    def tensor(rows: int, heads: int, dim: int) -> Tensor:
        if layout == "heads first":
            return torch.randn(heads, rows, dim, generator=random, device=device).to(dtype).transpose(0, 1)
        if layout == "part of wider rows":
            return torch.randn(rows, heads, dim + 8, generator=random, device=device).to(dtype)[..., :dim]
        return torch.randn(rows, heads, dim, generator=random, device=device).to(dtype)

    query = tensor(intervals.query_count, query_heads, dim)
    key, value = (tensor(intervals.key_count, key_heads, x) for x in dims)
    # So that all gradients are at most about 1: those of a key are sums over the rows that see it.
    shared = max(1, intervals.query_count * query_heads / max(1, intervals.key_count * key_heads)) ** -0.5
    dout = tensor(intervals.query_count, query_heads, value_dim) * (value_dim**-0.5 * shared)
    dlse = torch.randn(query_heads, intervals.query_count, generator=random, device=device) * shared
    if layout == "one row for all" and intervals.query_count:  # as the gradient of a sum over tokens
        dout = dout[:1].expand_as(dout)
    problem = Problem(query, key, value, dout, dlse, intervals, scale or dim**-0.5, modifiers)
    return replace(problem, dlse=dlse * problem.visible().any(-1))


def run(
    kernels: ModuleType,
    problem: Problem,
    cuts: Sequence[int] = (),
    backwards: bool = False,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Results:
    """A problem solved by one implementation, its keys cut into launches that pass the state on as a ring does."""
    edges = [0, *sorted(cuts), problem.intervals.key_count]
    launches = list(itertools.pairwise(edges))
    launches = launches[::-1] if backwards else launches
    operands = [
        (problem.query, problem.key[a:b], problem.value[a:b], between(problem.intervals, a, b)) for a, b in launches
    ]
    settings = [{"scale": problem.scale, **_modifiers(problem.modifiers, a, b)} for a, b in launches]
    accumulator = torch.promote_types(problem.query.dtype, torch.float32)
    carry = None
    for index, launch in enumerate(operands):
        dtype = out_dtype if index == len(operands) - 1 else accumulator
        carry = kernels.attend(*launch, **settings[index], carry=carry, out_dtype=dtype)
    out, lse = carry
    dquery, dkeys, dvalues = None, {}, {}
    delta = kernels.row_delta(problem.dout, out.to(problem.query.dtype), problem.dlse)
    for index, (query, key, value, intervals) in enumerate(operands):
        dquery, dkeys[launches[index]], dvalues[launches[index]] = kernels.attend_backward(
            problem.dout,
            query,
            key,
            value,
            lse,
            delta,
            intervals,
            **settings[index],
            carry=dquery,
            dquery_dtype=None if index == len(operands) - 1 else accumulator,
            dkey_dtype=out_dtype,
            deterministic=deterministic,
        )
    dkey, dvalue = (torch.cat([parts[edge] for edge in sorted(parts)]) for parts in (dkeys, dvalues))
    return Results(out, lse, dquery, dkey, dvalue)


def between(intervals: KeyIntervals, first: int, last: int) -> KeyIntervals:
    """The intervals of a launch that holds only the keys [first, last)."""
    shown = [(bound.clamp(first, last) - first) for pair in intervals.ranges() for bound in pair]
    blocks = intervals.blocks and intervals.blocks.of_keys(first, last)
    return KeyIntervals(shown[0], shown[1], last - first, *shown[2:], blocks=blocks, even=intervals.even)


def _modifiers(modifiers: Modifiers | None, first: int, last: int) -> dict[str, Modifiers]:
    if modifiers is None:
        return {}
    of_keys = {name: getattr(modifiers, name) for name in ("key_positions", "key_visible")}
    return {"modifiers": replace(modifiers, **{n: x if x is None else x[first:last] for n, x in of_keys.items()})}


def exact(problem: Problem) -> Results:
    """float64 results of the reference."""
    operands = (problem.query.double(), problem.key.double(), problem.value.double())
    settings = {"scale": problem.scale, "modifiers": problem.modifiers}
    out, lse = reference.attend(*operands, problem.intervals, **settings)
    delta = reference.row_delta(problem.dout, out, problem.dlse)
    gradients = reference.attend_backward(problem.dout, *operands, lse, delta, problem.intervals, **settings)
    return Results(out, lse, *gradients)


def torch_own(problem: Problem) -> Results:
    """Results of torch's own attention and autograd in the problem's dtype, with a dense mask.

    That is scaled_dot_product_attention, or the usual few lines of eager torch for modifiers that it does not have.
    """
    query, key, value = (x.detach().clone().requires_grad_() for x in (problem.query, problem.key, problem.value))
    key_HSD, value_HSD = (
        x.repeat_interleave(query.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (key, value)
    )
    query_HTD = query.transpose(0, 1)
    visible = problem.visible().clone()
    blind = ~visible.any(-1)
    visible[..., 0] |= blind  # torch promises nothing for rows without keys: show one, and take no notice of them
    if problem.modifiers is None:
        # Torch's fused attention takes masks of whole 8 columns only, and is what one is held against.
        extra = -visible.shape[1] % 8
        keys, values = (pad(x, (0, 0, 0, extra))[None] for x in (key_HSD, value_HSD))
        out_HTD = scaled_dot_product_attention(
            query_HTD[None], keys, values, attn_mask=pad(visible, (0, extra)), scale=problem.scale
        )[0]
    else:
        scores = _masked_scores(query_HTD, key_HSD, visible, problem)
        weights = torch.softmax(scores, -1, dtype=torch.float32)
        if problem.modifiers.dropout:
            weights = weights * keep_mask(problem.modifiers, len(query_HTD)) / (1 - problem.modifiers.dropout)
        out_HTD = weights.to(query.dtype) @ value_HSD
    out = out_HTD.transpose(0, 1)
    # Gradients of lse pass through scores in the problem's dtype, as those of out do; its values are float32's.
    lse = torch.logsumexp(_masked_scores(query_HTD, key_HSD, visible, problem).float(), -1)
    of_rows = blind.expand(query.shape[1], -1).T[..., None]
    dout = problem.dout.masked_fill(of_rows, 0)
    gradients = torch.autograd.grad((out, lse), (query, key, value), (dout, problem.dlse))
    lse = torch.logsumexp(_masked_scores(query_HTD.float(), key_HSD.float(), visible, problem), -1)
    out = out.detach().masked_fill(of_rows, 0)
    return Results(out, lse.detach().masked_fill(blind, -torch.inf), *gradients)


def torch_own_out_with_sinks(problem: Problem, sinks: Tensor) -> Tensor:
    """out of the usual few lines of eager torch for learned sinks (H,), without modifiers, in the problem's dtype."""
    groups = problem.query.shape[1] // problem.key.shape[1]
    key_HSD, value_HSD = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (problem.key, problem.value))
    scores = _masked_scores(problem.query.transpose(0, 1), key_HSD, problem.visible(), problem).float()
    column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return (weights.to(problem.query.dtype) @ value_HSD).transpose(0, 1)


def _masked_scores(query_HTD: Tensor, key_HSD: Tensor, visible: Tensor, problem: Problem) -> Tensor:
    """(H, T, S) after softcap and ALiBi, in the dtype of query."""
    scores, modifiers = query_HTD @ key_HSD.mT * problem.scale, problem.modifiers
    if modifiers is not None and modifiers.softcap:
        scores = modifiers.softcap * torch.tanh(scores / modifiers.softcap)
    if modifiers is not None and modifiers.slopes is not None:
        far = (modifiers.query_positions[:, None] - modifiers.key_positions).abs()
        scores = scores - (modifiers.slopes.T[..., None] * far).to(scores.dtype)
    return scores.masked_fill(~visible, -torch.inf)


def assert_accurate(results: Results, problem: Problem) -> None:
    """The tolerance: at most twice the error of torch's own attention in the same dtype, and 1e-5.

    Torch's error is the largest over at least 128 rows: on a handful of rows either side may be right by chance.
    """
    truth = exact(problem)
    torch_errors = [errors(torch_own(p), exact(p)) for p in _alike(problem, rows=128)]
    if problem.modifiers is not None and problem.modifiers.dropout and problem.intervals.query_count < 8:
        # Eager torch keeps the weights, so that rows of one key have no error; its fused attention rounds out first.
        torch_errors += [errors(torch_own(p), exact(p)) for p in _alike(_one_row_of_two_keys(problem), rows=128)]
    for name, error in errors(results, truth).items():
        allowed = 2 * max((x[name] for x in torch_errors), default=0.0) + 1e-5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _alike(problem: Problem, rows: int) -> Iterator[Problem]:
    """The problem, and as many others with the same intervals and magnitudes as `rows` rows take."""
    queries = problem.intervals.query_count
    if queries and problem.intervals.key_count:
        yield problem
        for seed in range(1, -(-rows // queries)):
            generator = torch.Generator().manual_seed(seed)
            fresh = {name: _redrawn(getattr(problem, name), generator) for name in ("query", "key", "value", "dout")}
            yield replace(problem, **fresh)


def _one_row_of_two_keys(problem: Problem) -> Problem:
    """Numbers like the problem's, with values as large as those that dropout keeps, and no modifiers."""
    key, value = (x[:1].expand(2, -1, -1) for x in (problem.key, problem.value))
    return replace(
        problem,
        query=problem.query[:1],
        key=key,
        value=value / (1 - problem.modifiers.dropout),
        dout=problem.dout[:1],
        dlse=problem.dlse[:, :1],
        intervals=dense_intervals(1, 2, problem.query.device),
        modifiers=None,
    )


def _redrawn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the same mean square, shape, dtype and device."""
    size = x.double().square().mean().sqrt()
    return (torch.randn(x.shape, generator=generator).to(x.device) * size).to(x.dtype)


def errors(results: Results, right: Results) -> dict[str, float]:
    """Largest error of each result by its name."""
    pairs = {field.name: (getattr(results, field.name), getattr(right, field.name)) for field in fields(Results)}
    for name, (x, y) in pairs.items():
        assert x.shape == y.shape, f"{name} has shape {tuple(x.shape)}, not {tuple(y.shape)}"
    return {name: largest_error(x, y) for name, (x, y) in pairs.items()}


def largest_error(x: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinite unless both are infinite at the same places."""
    if not right.numel():
        return 0.0
    difference = (x.double() - right.double()).abs().masked_fill(x.double() == right.double(), 0)
    return difference.nan_to_num(nan=torch.inf).max().item()


def assert_nan_stays(kernels: ModuleType, dtype: torch.dtype, device: str, dim: int = 64) -> None:
    """Rows that see a key of nan are nan, out and lse, through two launches, and only they.

    Rows 39 to 59 see no other key of the first launch: an lse of -inf would tell the second that they have seen none.
    """
    query, key, value = torch.randn(3, 60, 2, dim, device=device).to(dtype)
    key[[20, 39]] = torch.nan
    row, carry = torch.arange(60, dtype=torch.int32, device=device), None
    start = torch.where(row < 39, 0, 39)
    for first, last in ((0, 40), (40, 60)):
        intervals = KeyIntervals((start - first).clamp(min=0), (row + 1 - first).clamp(0, last - first), last - first)
        operands = query, key[first:last], value[first:last]
        carry = kernels.attend(*operands, intervals, scale=0.125, carry=carry, out_dtype=torch.float32)
        out, lse = carry
        assert out[:20].isfinite().all()
        assert lse[:, :20].isfinite().all()
        seen = slice(20, 60)
        assert out[seen].isnan().all()
        assert lse[:, seen].isnan().all()


def assert_same(a: Results, b: Results) -> None:
    """Equal bit for bit."""
    for field in fields(Results):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def to_device(intervals: KeyIntervals, device: str) -> KeyIntervals:
    """The same intervals on another device."""
    bounds = [bound.to(device) for pair in intervals.ranges() for bound in pair]
    blocks = intervals.blocks and intervals.blocks.to(torch.device(device))
    return KeyIntervals(bounds[0], bounds[1], intervals.key_count, *bounds[2:], blocks=blocks)


def with_blocks(
    intervals: KeyIntervals, groups: int, sizes: tuple[int, int], seed: int, first: tuple[int, int] = (0, 0)
) -> KeyIntervals:
    """The intervals, of which a random layout for each group of heads shows a third.

    Args:
        intervals: on the CPU.
        groups: of heads.
        sizes: query rows and key rows of a block.
        seed: of the layout.
        first: rows of the first block of queries and of keys that are not among the rows.
    """
    random = torch.Generator().manual_seed(seed)
    rows = (intervals.query_count, intervals.key_count)
    places = [(torch.arange(n) + x) // size for n, size, x in zip(rows, sizes, first, strict=True)]
    counts = [(n + x) // size + 1 for n, size, x in zip(rows, sizes, first, strict=True)]
    shown = torch.rand(groups, *counts, generator=random) < 1 / 3
    blocks = KeyBlocks(places[0].int(), places[1].int(), (unit_of(places[0]), unit_of(places[1])), shown)
    return intervals.with_blocks(blocks)


# Random modifiers, blocks and intervals


@st.composite
def any_blocks(draw: st.DrawFn, key_heads: int) -> tuple[int, tuple[int, int], int, tuple[int, int]]:
    """What `with_blocks` takes beside intervals: groups, sizes, seed and first rows; half of the time whole blocks."""
    whole = draw(st.booleans())
    sizes = draw(st.tuples(*[st.sampled_from([16, 32, 64, 128]) if whole else st.integers(3, 90)] * 2))
    first = (0, 0) if whole else draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    groups = draw(st.sampled_from([n for n in range(1, key_heads + 1) if key_heads % n == 0]))
    return groups, sizes, draw(st.integers(0, 2**32 - 1)), first


@st.composite
def any_modifiers(draw: st.DrawFn, intervals: KeyIntervals, heads: int) -> Modifiers:
    """Any of softcap, ALiBi, dropout and padding, together; positions as a rank with a part of the line has them."""
    return draw_modifiers(
        intervals,
        heads,
        draw(st.integers(0, 2**63 - 1)),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        slopes=draw(st.sampled_from([None, *SLOPES])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3, 0.6])),
        padding=draw(st.booleans()),
    )


SLOPES = {
    "of each row": lambda random, rows, heads: torch.rand(rows, heads, generator=random),
    "of all rows": lambda random, rows, heads: torch.rand(heads, generator=random).expand(rows, heads),
    "heads first": lambda random, rows, heads: torch.rand(heads, rows, generator=random).T,
}


def draw_modifiers(
    intervals: KeyIntervals, heads: int, seed: int, softcap: float, slopes: str | None, dropout: float, padding: bool
) -> Modifiers:
    """Modifiers of the named kinds on the intervals' device; positions from 0 to 100 on."""
    queries, keys, device = intervals.query_count, intervals.key_count, intervals.start.device
    random = torch.Generator().manual_seed(seed)
    first_query, first_key = torch.randint(0, 100, (2,), generator=random).tolist()
    drawn_slopes = None if slopes is None else SLOPES[slopes](random, queries, heads)
    visible = torch.rand(keys, generator=random) < 0.8
    return Modifiers(
        softcap=softcap,
        slopes=None if drawn_slopes is None else drawn_slopes.to(device) / 8,
        dropout=dropout,
        seed=torch.tensor([seed], device=device),
        query_positions=torch.arange(queries, dtype=torch.int32, device=device) + first_query,
        key_positions=torch.arange(keys, dtype=torch.int32, device=device) + first_key,
        key_visible=visible.byte().to(device) if padding else None,
    )


def dense_intervals(query_count: int, key_count: int, device: torch.device | str = "cpu") -> KeyIntervals:
    """Every query row sees every key row."""
    start = torch.zeros(query_count, dtype=torch.int32, device=device)
    return KeyIntervals(start, torch.full_like(start, key_count), key_count)


@st.composite
def any_intervals(draw: st.DrawFn, longest: int, sink: bool | None = None) -> KeyIntervals:
    """Intervals of every kind that reaches a kernel, up to `longest` rows and keys; with or without sinks if asked."""
    kinds = ["monotone", "mask", "mask"] if sink else ["monotone", "mask", "mask", "dense", "causal"]
    kind = draw(st.sampled_from(kinds))
    if kind == "mask":
        return draw(mask_intervals(longest, sink))
    queries, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    if kind == "dense":
        return dense_intervals(queries, keys)
    if kind == "causal":
        return causal_intervals(queries, keys)
    return monotone_intervals(
        queries, keys, draw(st.integers(0, 2**32 - 1)), draw(st.booleans()) if sink is None else sink
    )


def monotone_intervals(queries: int, keys: int, seed: int, sink: bool) -> KeyIntervals:
    """Bounds that never decrease and promise nothing else: rows may be empty, steps are of any size."""
    random = torch.Generator().manual_seed(seed)
    start, stop, sink_start, sink_stop = (
        torch.randint(0, keys + 1, (queries,), generator=random, dtype=torch.int32).sort().values for _ in range(4)
    )
    if not sink:
        return KeyIntervals(start, stop, keys)
    return KeyIntervals(start, stop, keys, sink_start, torch.minimum(sink_stop, start))


@st.composite
def mask_intervals(draw: st.DrawFn, longest: int, sink: bool | None = None) -> KeyIntervals:
    """A mask over global positions, seen by a rank that holds one or two segments of queries and of keys."""
    total = draw(st.integers(1, 2 * longest))
    edges = [0, *sorted(draw(st.lists(st.integers(0, total), max_size=12))), total]
    kinds = ["causal", "bidirectional", "spans"] if sink is False else ["causal", "bidirectional", "spans", "branches"]
    kind = draw(st.sampled_from(kinds))
    if kind == "branches":
        prompt, *branches = [stop - start for start, stop in pairwise(edges)]
        return draw(_intervals_of(Mask.shared_prefix([prompt], [branches]), total, longest))
    spans = [span for span in pairwise(edges) if span[0] < span[1]]
    mask = Mask.causal(spans[::2]) if kind == "spans" else getattr(Mask, kind)()
    if draw(st.booleans()):
        mask &= Mask.documents([0, *sorted(draw(st.lists(st.integers(0, total), max_size=12))), total])
    sinks = draw(st.integers(1, 8)) if sink or (sink is None and draw(st.booleans())) else 0
    if sinks or draw(st.booleans()):
        right = None if kind == "spans" else draw(st.none() | st.integers(0, total))
        mask &= Mask.sliding_window(draw(st.integers(0, total)), right, sinks)
    return draw(_intervals_of(mask, total, longest))


@st.composite
def _intervals_of(draw: st.DrawFn, mask: Mask, total: int, longest: int) -> KeyIntervals:
    queries, keys = (draw(_segments(total, longest)) for _ in range(2))
    bounds = torch.tensor([[*mask.key_interval(p), *mask.sink_interval(p)] for p in queries.tolist()]).T.contiguous()
    start, stop, sink_start, sink_stop = torch.searchsorted(keys, bounds).to(torch.int32)
    return KeyIntervals(start, stop, len(keys), *((sink_start, sink_stop) if mask.two_intervals else ()))


@st.composite
def _segments(draw: st.DrawFn, total: int, longest: int) -> Tensor:
    """Ascending positions below `total`, in one segment or two."""
    edges = sorted(draw(st.lists(st.integers(0, total), min_size=4, max_size=4)))
    held = [*range(edges[0], edges[1]), *range(edges[2], edges[3])] if draw(st.booleans()) else [*range(edges[3])]
    return torch.tensor(held[-longest:] or [edges[0] - (edges[0] == total)])
