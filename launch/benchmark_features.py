"""What suite `kernels` times beside the dense cases: features, other head dimensions, masks, each beside its yardstick.

A feature is held against the same attention without it, a window against a wider one, a head dimension against cuDNN, a
short window with sinks against a copy of its bytes. TFLOP/s count visible pairs, as in the dense cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringflash import Mask
from ringflash.functional import attention
from ringflash.launch import benchmark_peers as peers
from ringflash.launch.benchmark_device import Timer, in_turn, timed_by_events
from ringflash.launch.benchmark_report import Row
from ringflash.parallel.positions.visibility import visible_pairs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PLAIN, CUDNN, COPY = "without", "cuDNN", "the same bytes copied"
"""Yardsticks: the same attention by these kernels without the feature, or another mask; and two of other makers."""


@dataclass(frozen=True)
class Feature:
    """One problem and what it is held against.

    Attributes:
        name: in tables.
        heads: of queries and of keys.
        dims: of query and key, and of value.
        length: tokens.
        mask: which keys a query sees.
        given: what attention is given beside that, by kind: a number, or "heads" (fp32, one for each) and "keys"
            (bool, one for each).
        against: the yardstick.
        without: the mask of `PLAIN`, the same one if None.
        dtype: of the tensors.
    """

    name: str
    heads: tuple[int, int] = (32, 8)
    dims: tuple[int, int] = (128, 128)
    length: int = 16384
    mask: Mask = field(default_factory=Mask.causal)
    given: dict[str, Any] = field(default_factory=dict)
    against: str = PLAIN
    without: Mask | None = None
    dtype: torch.dtype = torch.bfloat16

    def operations(self, direction: str, mask: Mask) -> float:
        """Of a pass under a mask."""
        dim, value_dim = self.dims
        products = dim + value_dim if direction == "fwd" else 3 * dim + 2 * value_dim
        return 2 * visible_pairs(mask, torch.arange(self.length), self.length) * self.heads[0] * products

    def nbytes(self, direction: str) -> int:
        """Of the tensors that a pass has to read and write once."""
        (heads, key_heads), (dim, value_dim) = self.heads, self.dims
        forward = self.length * (heads + key_heads) * (dim + value_dim) * 2
        return forward if direction == "fwd" else 2 * forward


def features() -> Iterator[Feature]:
    """All of them, on one sequence."""
    yield Feature("softcap 50", given={"softcap": 50.0})
    yield Feature("ALiBi", given={"alibi_slopes": "heads"})
    yield Feature("dropout 0.1", given={"dropout": 0.1})
    yield Feature("key padding", given={"key_padding_mask": "keys"})
    yield Feature("learned sinks", given={"sinks": "heads"})
    yield Feature("learned sinks, gpt-oss", (64, 8), (64, 64), given={"sinks": "heads"})
    short = {"length": 32768, "mask": Mask.sliding_window(127), "given": {"sinks": "heads"}, "against": COPY}
    yield Feature("window 128 with sinks, gpt-oss", (64, 8), (64, 64), **short)
    yield Feature("window 1023", mask=Mask.sliding_window(1023), without=Mask.sliding_window(4096))
    window = Mask.sliding_window(1023)
    yield Feature("window 1023, 4 sink tokens", mask=Mask.sliding_window(1023, sink=4), without=window)
    for dim in (80, 96, 112):
        yield Feature(f"D{dim}", dims=(dim, dim), against=CUDNN)
    yield Feature("D192", (16, 8), (192, 192), against=CUDNN)
    yield Feature("MLA 192/128", (128, 128), (192, 128), 8192, against=CUDNN)
    yield Feature("D512", (16, 4), (512, 512), 8192)
    chosen = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)).topk(16, dim=1).indices
    layout = torch.zeros(128, 128, dtype=torch.bool).scatter_(1, chosen, True)
    yield Feature("16 random blocks of 128", mask=Mask.blocks(layout.tolist(), 128), without=Mask.bidirectional())
    prefix = Mask.shared_prefix([8192], [[4096] * 8])
    yield Feature("prefix of 8K, 8 branches of 4K", length=40960, mask=prefix, without=Mask.causal())
    yield Feature("fp16", dtype=torch.float16, against=CUDNN)


def feature_rows(word: str, repeats: int) -> Iterator[list[Row]]:
    """Rows of each case with a word in its name."""
    for case in features():
        if word in case.name:
            yield _rows(case, repeats)


def _rows(case: Feature, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    (heads, key_heads), (dim, value_dim) = case.heads, case.dims
    shapes = [(1, case.length, n, d) for n, d in ((heads, dim), (key_heads, dim), (key_heads, value_dim))]
    leaves = [torch.randn(x, device="cuda", dtype=case.dtype, requires_grad=True) for x in shapes]
    rows = []
    ways = _ways(case)
    runs: dict[str, dict[str, Timer]] = {"fwd": {}, "bwd": {}}
    for name, (attend, _) in ways.items():
        try:
            out = attend(*leaves)
        except RuntimeError as error:
            if name == "ringflash":
                raise
            print(f"{name} is left out of {case.name}: {str(error).splitlines()[0]}", flush=True)
            continue
        backward = functools.partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
        runs["fwd"][name], runs["bwd"][name] = map(timed_by_events, (functools.partial(attend, *leaves), backward))
    for direction, timers in runs.items():
        if case.against == COPY:
            half = torch.empty(case.nbytes(direction) // 2, dtype=torch.uint8, device="cuda")  # read, then written
            timers[COPY] = timed_by_events(functools.partial(torch.empty_like(half).copy_, half))
        for name, milliseconds in in_turn(timers, repeats).items():
            mask = ways[name][1] if name in ways else case.mask
            speed = case.operations(direction, mask) / milliseconds / 1e9
            rows.append(Row(name, case.name, case.length, direction, milliseconds, speed))
    return rows


def _ways(case: Feature) -> dict[str, tuple[Attend, Mask]]:
    """Implementations, each with the mask by which its pairs are counted."""
    given = {name: _tensor(case, x) for name, x in case.given.items()}
    if case.given.get("dropout"):
        given["dropout_seed"] = torch.zeros(1, dtype=torch.int64, device="cuda")
    found: dict[str, tuple[Attend, Mask]] = {"ringflash": (_ours(case.mask, given), case.mask)}
    if case.against == CUDNN:
        grouped = case.heads[0] != case.heads[1]
        found[CUDNN] = functools.partial(peers.cudnn, causal=True, grouped=grouped), case.mask
    elif case.against == PLAIN:
        mask = case.without or case.mask
        found[PLAIN] = _ours(mask, {}), mask
    return found


def _ours(mask: Mask, given: dict[str, Any]) -> Attend:
    return lambda query, key, value: attention(query, key, value, mask=mask, **given)[0]


def _tensor(case: Feature, kind: object) -> object:
    """What attention is given, of a kind."""
    if kind == "heads":
        return torch.rand(case.heads[0], device="cuda")
    if kind == "keys":
        return torch.rand(1, case.length, device="cuda") > 0.2
    return kind


def ratios(rows: list[Row]) -> list[str]:
    """Ours beside the yardstick of each case, forward and forward + backward by time and pairs."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        found = {(row.implementation, row.direction): row for row in rows if row.case == case}
        for name in (PLAIN, CUDNN, COPY):
            if (name, "fwd") in found:
                cells = [_ratio(found, name, directions) for directions in (("fwd",), ("fwd", "bwd"))]
                lines.append(f"{case:36s} {name:24s} forward {cells[0]:.2f}, both {cells[1]:.2f}")
    return lines


def _ratio(found: dict[tuple[str, str], Row], name: str, directions: tuple[str, ...]) -> float:
    ours, theirs = ([found[x, way] for way in directions] for x in ("ringflash", name))
    speeds = [sum(r.tflops * r.milliseconds for r in x) / sum(r.milliseconds for r in x) for x in (ours, theirs)]
    return speeds[0] / speeds[1]
