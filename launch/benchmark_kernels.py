"""Suite `kernels`: attention on one GPU, forward and backward, beside the peers that are installed.

Random bf16 inputs. TFLOP/s count visible pairs of query and key; the ratio is to the fastest of cuDNN, FlashAttention-3
and FlashAttention-4 in the same run. Backward is timed alone, with the forward done before. Implementations take turns
(see `benchmark_device.in_turn`), `repeats` rounds of them. Options: `cases=documents` runs the cases with that word in
their names, `tokens=2048,8192` the dense ones of those lengths. Without `tokens` there are also those of
`benchmark_features`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash import Mask
from ringflash.errors import ArgumentError
from ringflash.functional import attention
from ringflash.kernels.intervals import causal_intervals
from ringflash.kernels.select import select
from ringflash.launch import benchmark_peers as peers
from ringflash.launch.benchmark_device import Timer, in_turn, timed_by_events
from ringflash.launch.benchmark_features import feature_rows, ratios
from ringflash.launch.benchmark_report import Report, Row, table_of_speeds

if TYPE_CHECKING:
    from ringflash.launch.benchmark import Options

HEADS = {128: 16, 64: 32, 256: 8}
TOTAL = 32768
LENGTHS = (2048, 8192, 16384, 32768)
REPEATS = 20


@dataclass(frozen=True)
class Case:
    """One problem: `batch` sequences of `length` tokens, or documents of the given lengths laid end to end."""

    name: str
    head_dim: int
    heads: int
    key_heads: int
    batch: int
    length: int
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()
    deterministic: bool = False

    @property
    def mask(self) -> Mask:
        """Of one sequence, or of all documents."""
        mask = Mask.causal() if self.causal else Mask.bidirectional()
        if self.window is not None:
            mask &= Mask.sliding_window(self.window, 0)
        if self.documents:
            mask &= Mask.documents([0, *itertools.accumulate(self.documents)])
        return mask

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key, for each head."""
        return self.batch * sum(self._pairs(n) for n in self.documents or (self.length,))

    def _pairs(self, n: int) -> int:
        if not self.causal:
            return n * n
        seen = n if self.window is None else min(n, self.window + 1)
        return seen * (seen + 1) // 2 + (n - seen) * seen


def cases(lengths: tuple[int, ...]) -> Iterator[Case]:
    """Dense ones at every length, and at 65,536 tokens of 32 heads on 8 key heads what long training meets."""
    for (dim, heads), causal, length in itertools.product(HEADS.items(), (True, False), lengths):
        name = f"D{dim} {'causal' if causal else 'full'} {length}"
        yield Case(name, dim, heads, heads, TOTAL // length, length, causal)
    yield Case("D128 causal 65536 grouped", 128, 32, 8, 1, 65536)
    yield Case("D128 causal 16384 grouped", 128, 32, 8, 2, 16384)
    yield Case("D128 causal 16384 multi-head", 128, 32, 32, 2, 16384)
    yield Case("D128 causal 16384 deterministic", 128, 32, 8, 2, 16384, deterministic=True)
    yield Case("D128 window 4096 of 65536", 128, 32, 8, 1, 65536, window=4096)
    for mean in (1024, 4096, 16384):
        documents = document_lengths(mean, 65536)
        yield Case(f"D128 documents of mean {mean}", 128, 32, 8, 1, 65536, documents=documents)


def document_lengths(mean: int, total: int) -> tuple[int, ...]:
    """Log-normal lengths (sigma 1) that sum to `total`, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = int(torch.exp(torch.randn((), generator=generator) + math.log(mean) - 0.5))
        lengths.append(min(max(16, drawn), left))
    return tuple(lengths)


def measure(options: Options) -> Iterator[Report]:
    """Rows of every implementation, after every case."""
    rows, repeats = [], options.repeats or REPEATS
    for case in cases(options.tokens or LENGTHS):
        if options.cases not in case.name:
            continue
        for name, direction, milliseconds in _times(case, repeats):
            operations = 4 * case.pairs * case.heads * case.head_dim * (1.0 if direction == "fwd" else 2.5)
            rows.append(Row(name, case.name, case.length, direction, milliseconds, operations / milliseconds / 1e9))
            row = rows[-1]
            print(f"{name:18s} {case.name:34s} {direction} {milliseconds:9.3f} ms {row.tflops:5.0f}", flush=True)
        yield Report(rows, table_of_speeds(rows))
    if options.cases in CARRY:
        rows += _carry_rows(repeats)
    special: list[Row] = []
    for found in () if options.tokens else feature_rows(options.cases, repeats):
        special += found
        yield Report(rows + special, table_of_speeds(rows + special))
    for line in peers.missing():
        print(line)
    print_ratios(rows)
    print("\n".join(ratios(special)), flush=True)
    rows += special
    yield Report(rows, table_of_speeds(rows))


def _times(case: Case, repeats: int) -> Iterator[tuple[str, str, float]]:
    """Name, direction and median milliseconds of every implementation."""
    torch.manual_seed(0)
    shapes = [(case.batch, case.length, n, case.head_dim) for n in (case.heads, case.key_heads, case.key_heads)]
    leaves = [torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes]
    dout = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    runs: dict[str, dict[str, Timer]] = {"fwd": {}, "bwd": {}}
    for name, attend in _implementations(case).items():
        try:
            out = attend(*leaves)
            backward = functools.partial(torch.autograd.grad, out, leaves, dout.view_as(out), retain_graph=True)
            backward()
        except (RuntimeError, AssertionError) as error:
            if name.startswith("ringflash"):
                raise
            print(f"{name} is left out of {case.name}: {str(error).splitlines()[0]}", flush=True)
            continue
        runs["fwd"][name] = timed_by_events(functools.partial(attend, *leaves))
        runs["bwd"][name] = timed_by_events(backward)
    for direction, timer in peers.flash_attention_3_jax(case).items():
        runs[direction]["FlashAttention-3"] = timer
    if case.deterministic:
        del runs["fwd"]
    for direction, timers in runs.items():
        for name, milliseconds in in_turn(timers, repeats).items():
            yield name, direction, milliseconds


def _implementations(case: Case) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    found = {}
    dense = not (case.window or case.documents or case.deterministic)
    for name in ("hopper", "triton"):
        try:
            select("cuda", torch.bfloat16, case.head_dim, kernel=name)
        except ArgumentError as error:
            print(f"ringflash {name} is left out: {error}")
            continue
        if name == "hopper" or case.length == 16384 or not dense:
            found[f"ringflash {name}"] = functools.partial(_ours, case=case, mask=case.mask, kernel=name)
    if dense and case.heads == case.key_heads:
        found["cuDNN"] = functools.partial(peers.cudnn, causal=case.causal)
        if case.length == 16384:
            found["FlashAttention-2"] = functools.partial(peers.flash_attention_2, causal=case.causal)
            if case.head_dim <= 128:
                found["FlexAttention"] = peers.flex(case.causal, case.length)
    elif dense:
        found["cuDNN"] = functools.partial(peers.cudnn, causal=case.causal, grouped=True)
    return found | peers.flash_attention_3(case) | peers.flash_attention_4(case)


def _ours(query: Tensor, key: Tensor, value: Tensor, case: Case, mask: Mask, kernel: str) -> Tensor:
    return attention(query, key, value, mask=mask, kernel=kernel, deterministic=case.deterministic)[0]


CARRY = "D128 causal 8192 carry"


def _carry_rows(repeats: int) -> list[Row]:
    """The Hopper forward with an earlier launch's state merged in, beside the same launch without one."""
    try:
        kernels = select("cuda", torch.bfloat16, 128, kernel="hopper")
    except ArgumentError as error:
        print(f"{CARRY} is left out: {error}")
        return []
    tokens, heads = 8192, 16
    query, key, value = (torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    intervals = causal_intervals(tokens, tokens, "cuda")
    attend = functools.partial(kernels.attend, query, key, value, intervals, scale=128**-0.5)
    carry = attend(out_dtype=torch.float32)
    operations = 2 * tokens * (tokens + 1) * heads * 128
    rows = []
    runs = {
        "ringflash hopper": functools.partial(attend, carry=carry, out_dtype=torch.bfloat16),
        "no carry": attend,
    }
    for name, milliseconds in in_turn({name: timed_by_events(run) for name, run in runs.items()}, repeats).items():
        rows.append(Row(name, CARRY, tokens, "fwd", milliseconds, operations / milliseconds / 1e9))
    return rows


def print_ratios(rows: list[Row]) -> None:
    """Our Hopper kernels beside the fastest peer of each case."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.case, row.direction), {})[row.implementation] = row.tflops
    print(f"\n{'case':36s} {'':3s} {'ours':>6s} {'best peer':>10s} {'ratio':>6s}")
    for (case, direction), speeds in found.items():
        ours = speeds.get("ringflash hopper")
        best = max((x for name, x in speeds.items() if name in peers.FASTEST), default=speeds.get("no carry"))
        if ours and best:
            print(f"{case:36s} {direction} {ours:6.0f} {best:10.0f} {ours / best:6.2f}")
    print(flush=True)
