"""Attention problems with every mask and feature, their float64 answer by definition, and torch's own in their dtype.

The answer is written down from the definitions, document by document and pair by pair, and shares nothing with the
library but Philox, whose words test_functional.py holds against an implementation of its own.

Legend: N documents, T query and S key tokens of all of them end to end, H query heads, Hk key heads, D head dimension,
Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ringflash import UnsupportedError
from ringflash.kernels.modifiers import dropout_threshold, philox
from ringflash.parallel.positions.mask import Mask


@dataclass(frozen=True)
class Rules:
    """Which keys a query sees, beside its document; None and 0 are no such rule."""

    left: int | None = None
    right: int | None = None
    sink: int = 0
    chunk: int | None = None
    prefix: int | None = None
    layout: tuple[tuple[bool, ...], ...] | None = None
    blocks: tuple[int, int] = (1, 1)

    def mask(self) -> Mask:
        """The mask that means the same."""
        mask = Mask.sliding_window(self.left, self.right, self.sink)
        mask = mask if self.chunk is None else mask & Mask.chunked(self.chunk)
        mask = mask if self.prefix is None else mask & Mask.prefix_lm(self.prefix)
        return mask if self.layout is None else mask & Mask.blocks(self.layout, self.blocks)

    def visible(self, queries: int, keys: int) -> Tensor:
        """Dense (queries, keys) matrix of one document, aligned at its end."""
        place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None, :]
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if self.left is not None:
            seen &= (key >= place - self.left) | (key < self.sink)
        if self.right is not None:
            seen &= key <= place + self.right
        if self.chunk is not None:
            seen &= place.div(self.chunk, rounding_mode="floor") == key // self.chunk
        if self.prefix is not None:
            seen &= (key <= place) | (key < self.prefix)
        if self.layout is not None:
            pairs = torch.tensor(self.layout).repeat_interleave(self.blocks[0], 0).repeat_interleave(self.blocks[1], 1)
            seen &= pairs[:queries, :keys]
        return seen


@dataclass(frozen=True)
class Case:
    """One problem without its tensors.

    Attributes:
        lengths: query and key tokens of each document.
        heads: H and Hk.
        dims: D and Dv.
    """

    lengths: tuple[tuple[int, int], ...]
    rules: Rules = Rules()
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    scale: float = 0.25
    softcap: float = 0.0
    alibi: str = ""
    dropout: float = 0.0
    padding: bool = False
    sinks: bool = False
    seed: int = 0

    @property
    def queries(self) -> int:
        return sum(queries for queries, _ in self.lengths)

    @property
    def keys(self) -> int:
        return sum(keys for _, keys in self.lengths)

    def edges(self) -> tuple[list[int], list[int]]:
        """Boundaries of the queries and of the keys."""
        return tuple([sum(x[i] for x in self.lengths[:n]) for n in range(len(self.lengths) + 1)] for i in (0, 1))

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention can do it."""
        return not (self.softcap or self.alibi or self.dropout)


@dataclass(frozen=True)
class Tensors:
    """What a case is solved with.

    Attributes:
        query: (T, H, D).
        key: (S, Hk, D).
        value: (S, Hk, Dv).
        sinks: (H,) or None.
        dout: (T, H, Dv), gradient of out.
        dlse: (H, T) fp32, gradient of the log-sum-exp.
        slopes: (H,) or (N, H) fp32, or None.
        padding: (S,) bool, or None.
        dropout_seed: (1,) int64, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    dout: Tensor
    dlse: Tensor
    slopes: Tensor | None
    padding: Tensor | None
    dropout_seed: Tensor | None


Answer = tuple[Tensor, ...]
"""out (T, H, Dv), lse (H, T), and the gradients of query, key, value and sinks if any."""


def tensors(case: Case) -> Tensors:
    """Random tensors; rows that see no key get no gradient of their log-sum-exp."""
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    heads, key_heads = case.heads
    query, key = draw(case.queries, heads, case.dims[0]), draw(case.keys, key_heads, case.dims[0])
    value, dout = draw(case.keys, key_heads, case.dims[1]), draw(case.queries, heads, case.dims[1]) / 4
    slopes_shape = {"": None, "heads": (heads,), "documents": (len(case.lengths), heads)}[case.alibi]
    padding = torch.rand(case.keys, generator=random) < 0.7 if case.padding else None
    dlse = draw(heads, case.queries)
    if not case.sinks:
        dlse = dlse * _visible(case, padding).any(1)
    return Tensors(
        *(x.to(case.dtype) for x in (query, key, value)),
        draw(heads) if case.sinks else None,
        dout.to(case.dtype),
        dlse,
        None if slopes_shape is None else torch.rand(slopes_shape, generator=random),
        padding,
        torch.randint(2**62, (1,), generator=random) if case.dropout else None,
    )


def solve(attend: Callable[..., tuple[Tensor, Tensor]], given: Tensors) -> Answer:
    """Results and gradients of `attend(query, key, value, sinks)`."""
    differentiable = [x for x in (given.query, given.key, given.value, given.sinks) if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in differentiable]
    out, lse = attend(*leaves, *[None] * (4 - len(leaves)))
    gradients = torch.autograd.grad((out, lse), leaves, (given.dout.to(out), given.dlse.to(lse)))
    return out.detach(), lse.detach(), *gradients


def exact(case: Case, given: Tensors) -> Answer:
    """The answer in float64."""
    wide = replace(given, **{name: x.double() for name, x in vars(given).items() if _is_real(x)})
    return solve(lambda *x: by_definition(case, wide, *x), wide)


def torchs_own_errors(case: Case, given: Tensors) -> list[float]:
    """Largest errors of torch's fused attention, and where it lacks a feature of the formula in torch's own operators.

    As in attention that is written out for a model, scores and softmax are then in float32 and weights in the dtype.
    That keeps weights for the backward pass, which fused attention does not: so the errors of fused attention count
    there too, without the features, and with values as large as dropout makes them.
    """
    if case.plain:
        errors = largest_errors(solve(lambda *x: _fused(case, given, *x), given), exact(case, given))
        if not case.sinks:
            return errors
        # Fused attention knows no sinks. What weighs them in behind it never rounds `out` with them in it, whose
        # gradient every attention that returns `out` has to take; one that is written out rounds the weights.
        of_sinks = largest_errors(solve(lambda *x: by_definition(case, given, *x), given), exact(case, given))[-1]
        return [*errors[:-1], max(errors[-1], of_sinks)]
    written_out = largest_errors(solve(lambda *x: by_definition(case, given, *x), given), exact(case, given))
    plain = replace(case, softcap=0.0, alibi="", dropout=0.0)
    alike = replace(given, value=given.value / (1 - case.dropout), slopes=None, dropout_seed=None)
    return [max(pair) for pair in zip(written_out, torchs_own_errors(plain, alike), strict=True)]


def by_definition(
    case: Case, given: Tensors, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp, from dense scores of all documents; in float64, or with float32 scores."""
    wide = torch.promote_types(query.dtype, torch.float32)
    visible = _visible(case, given.padding)
    q, k, v = _heads_first(case, query, key, value)
    scores = q.to(wide) @ k.to(wide).mT * case.scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    distance = _places(case)[:, None] - torch.arange(case.keys)[None, :]
    if given.slopes is not None:
        slopes = given.slopes.expand(len(case.lengths), -1)[_document_of(case, 0)]
        scores = scores - slopes.T[..., None].to(wide) * distance.abs()
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, case.queries, 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[..., None])[..., : case.keys]
    if case.dropout:
        weights = torch.where(kept(case, given), weights / (1 - case.dropout), 0)
    return (weights.to(v.dtype) @ v).transpose(0, 1), lse


def _fused(
    case: Case, given: Tensors, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    visible = _visible(case, given.padding)
    blind = ~visible.any(1)
    q, k, v = _heads_first(case, query, key, value)
    # torch promises nothing for rows without keys: show all, and take no notice of them.
    out = scaled_dot_product_attention(q[None], k[None], v[None], visible | blind[:, None], scale=case.scale)[0]
    scores = (q.float() @ k.float().mT * case.scale).masked_fill(~visible, -torch.inf)
    out, lse = out.transpose(0, 1).masked_fill(blind[:, None, None], 0), scores.logsumexp(-1)
    if sinks is None:
        return out, lse
    with_sink = torch.logaddexp(lse, sinks[:, None])
    return (out * torch.exp(lse - with_sink).T[..., None]).to(out.dtype), with_sink


def kept(case: Case, given: Tensors) -> Tensor:
    """(H, T, S) pairs that dropout keeps."""
    head = torch.arange(case.heads[0])[:, None, None]
    words = philox(given.dropout_seed, torch.arange(case.keys)[None, None, :], _places(case)[None, :, None], head)
    return words >= dropout_threshold(case.dropout)


def _visible(case: Case, padding: Tensor | None) -> Tensor:
    blocks = [case.rules.visible(*lengths) for lengths in case.lengths]
    visible = torch.block_diag(*blocks).bool().reshape(case.queries, case.keys)
    return visible if padding is None else visible & padding


def _document_of(case: Case, side: int) -> Tensor:
    return torch.tensor([n for n, lengths in enumerate(case.lengths) for _ in range(lengths[side])], dtype=torch.int64)


def _places(case: Case) -> Tensor:
    """(T,) place of each query among the keys: the last of a document stands at its last key."""
    queries, keys = (torch.tensor(x[1:]) for x in case.edges())
    return torch.arange(case.queries) + (keys - queries)[_document_of(case, 0)]


def _heads_first(case: Case, *x: Tensor) -> list[Tensor]:
    return [y.transpose(0, 1).repeat_interleave(case.heads[0] // y.shape[1], dim=0) for y in x]


def _is_real(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def assert_as_exact_as_torch(found: Answer, case: Case, given: Tensors) -> None:
    """At most twice the error of torch's own attention in the same dtype, and 1e-5.

    Torch's error is the largest over at least 128 rows that see a key, and 32 sinks: on a handful of numbers either
    side may be right by chance.
    """
    rows = int(_visible(case, given.padding).any(1).sum())
    rows = rows if given.sinks is None else min(rows, 4 * len(given.sinks))
    names = ("out", "lse", "dquery", "dkey", "dvalue", "dsinks")
    right = exact(case, given)
    allowed = [torchs_own_errors(case, given)]
    for seed in range(1, min(19, -(-128 // max(1, rows)))):
        allowed.append(torchs_own_errors(case, tensors(replace(case, seed=case.seed + seed))))
    for name, error, limits in zip(names, largest_errors(found, right), zip(*allowed, strict=True), strict=False):
        assert error <= 2 * max(limits) + 1e-5, f"{name}: error {error:.3g}, torch's own {max(limits):.3g}"


def largest_errors(found: Answer, right: Answer) -> list[float]:
    """Largest absolute error of each result; infinite unless both are infinite at the same places."""
    assert [x.shape for x in found] == [x.shape for x in right]
    return [_largest_error(x.double(), y) for x, y in zip(found, right, strict=True)]


def _largest_error(x: Tensor, right: Tensor) -> float:
    difference = (x - right).abs().masked_fill(x == right, 0)
    return difference.nan_to_num(nan=torch.inf).max().item() if right.numel() else 0.0


# Random cases

SCALES = (0.1, 0.25, 0.7)


@st.composite
def rules(draw: st.DrawFn, window_only: bool = False) -> Rules:
    """Any composition of rules; only causal and windows if asked, as flash-attn's arguments can say them."""
    bound = st.none() | st.integers(0, 20)
    causal = draw(st.booleans())
    found = Rules(left=draw(bound), right=0 if causal else draw(bound))
    if window_only:
        return found
    if found.left is not None and draw(st.booleans()):
        found = replace(found, sink=draw(st.integers(1, 5)))
    if draw(st.integers(0, 3)) == 0:
        found = replace(found, chunk=draw(st.integers(1, 15)))
    if draw(st.integers(0, 3)) == 0:
        # A prefix replaces the causal bound; it would mean nothing beside it.
        found = replace(found, prefix=draw(st.integers(0, 20)), right=None)
    if draw(st.integers(0, 3)) == 0:
        found = replace(found, **draw(layouts()))
    return found


LONGEST = 33
"""Tokens of the longest random document."""


@st.composite
def layouts(draw: st.DrawFn) -> dict:
    """Any layout of blocks that reaches over the longest document."""
    blocks = tuple(draw(st.integers(4, LONGEST)) for _ in range(2))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shown = torch.rand([-(-LONGEST // size) for size in blocks], generator=random) < draw(st.sampled_from([0.3, 0.7]))
    return {"layout": tuple(map(tuple, shown.tolist())), "blocks": blocks}


@st.composite
def lengths(draw: st.DrawFn, dense: bool, same: bool = False) -> tuple[tuple[int, int], ...]:
    """Query and key lengths of documents, empty ones too; all alike if dense, queries as keys if same."""
    length = st.sampled_from([1, 2, 7, 16, LONGEST]) if dense else st.sampled_from([0, 0, 1, 2, 7, 16, 29])
    pair = length.map(lambda x: (x, x)) if same else st.tuples(length, length)
    return (draw(pair),) * draw(st.integers(1, 3)) if dense else tuple(draw(st.lists(pair, min_size=1, max_size=5)))


HEAD_DIMS = (48, 64, 96, 128, 192, 256, 512)


@st.composite
def wide_heads(draw: st.DrawFn, case: Case, dims: Sequence[int] = HEAD_DIMS) -> Case:
    """The case with one of these head dimensions, and as many or others for the value.

    The gradient of a row with one key is a difference of two equal sums over the value's dimension, which torch's fused
    attention gives as 0: long sums, made ten times as large by dropout of 0.9, would differ by 1e-5.
    """
    dim = draw(st.sampled_from(dims))
    value_dim = draw(st.just(dim) | st.sampled_from(HEAD_DIMS))
    return replace(case, dims=(dim, value_dim), scale=dim**-0.5, dropout=min(case.dropout, 0.5))


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype,
    dense: bool,
    same: bool = False,
    flash: bool = False,
) -> Case:
    """Any case; if flash only with what flash-attn's arguments can say."""
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    dim = draw(st.sampled_from([8, 16, 40]))
    features = draw(st.sets(st.sampled_from(["softcap", "alibi", "dropout", "padding", "sinks"]), max_size=3))
    features -= {"padding", "sinks"} if flash else set()
    # A row with one key has no error in torch's fused attention; where 1 / (1 - dropout) is a power of two, none here.
    dropouts = [0.5, 0.75] if dtype.itemsize == 2 else [0.1, 0.5, 0.9]
    return Case(
        draw(lengths(dense, same)),
        draw(rules(window_only=flash)),
        (key_heads * group, key_heads),
        (dim, draw(st.sampled_from([dim, dim, 24]))),
        dtype,
        draw(st.sampled_from(SCALES)),
        softcap=draw(st.sampled_from([0.5, 2.0, 30.0])) if "softcap" in features else 0.0,
        alibi=draw(st.sampled_from(["heads", "documents"])) if "alibi" in features else "",
        dropout=draw(st.sampled_from(dropouts)) if "dropout" in features else 0.0,
        padding="padding" in features,
        sinks="sinks" in features,
        seed=draw(st.integers(0, 2**20)),
    )


def assert_transformations_are_refused(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Second derivatives, forward mode and vmap of a function of one tensor, each in words of its own."""
    leaf = torch.randn_like(x).requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        gradient.sum().backward()
    with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(UnsupportedError, match=r"vmap.*batch dimension"):
        torch.vmap(call)(x[None])
