"""Suite `sdpa`: fused attention beside eager softmax attention, and beside torch's `scaled_dot_product_attention`.

Eager is what the formula says: a product, a softmax, a product, each with all pairs of query and key in memory. 32
heads of dimension 128, fp16; on a CPU fp32, because there fp16 is slower than fp32 and nobody uses it. One sequence,
and on GPUs also a batch of TOTAL tokens, because short sequences alone take less time than asking for them. Every
implementation is first held against eager attention in fp32: one of ours that differs by more than TOLERANCE is not
timed, and the command fails with the difference. Differences are the largest of any entry, as a share of the largest
entry where that is above 1. Options: `cases=causal` runs the cases with that word in their names.

Legend: B sequences, T tokens of each, H heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ringflash import Mask
from ringflash.functional import attention
from ringflash.launch.benchmark_device import device_name, in_turn, lack_of_memory, timer_of
from ringflash.launch.benchmark_report import Report, Skipped

if TYPE_CHECKING:
    from ringflash.launch.benchmark import Options

HEADS, DIM = 32, 128
LENGTHS = (256, 512, 1024, 2048, 4096)
TOTAL = 16384
TOLERANCE = 1e-3
REPEATS = {"cuda": 10, "cpu": 3}
KEPT = 5
"""Tensors of all pairs that eager attention holds at once: scores, masked scores, weights and the gradients of two."""

EAGER, TORCH, OURS = "eager", "torch sdpa", "ringflash"
DIRECTIONS = ("fwd", "fwd+bwd")


@dataclass(frozen=True)
class Case:
    """One problem."""

    causal: bool
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """As in "causal 4 x 1024"."""
        return f"{'causal' if self.causal else 'full'} {self.batch} x {self.tokens}"

    def pairs_bytes(self, dtype: torch.dtype) -> int:
        """What eager attention of the whole batch holds of pairs of query and key."""
        return KEPT * self.batch * HEADS * self.tokens**2 * dtype.itemsize


@dataclass(frozen=True)
class Row:
    """One measurement; `difference` is that from eager attention in fp32, of the output or of the gradients."""

    implementation: str
    case: str
    causal: bool
    batch: int
    tokens: int
    direction: str
    milliseconds: float
    times_eager: float | None
    difference: float


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """Attention of query, key and value, (B, H, T, D) each if `heads_first`, and (B, T, H, D) if not."""

    attend: Attend
    heads_first: bool = True


def eager(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax attention by its formula.

    Args:
        query: (B, H, T, D).
        key: (B, H, T, D).
        value: (B, H, T, D).
        hidden: (T, T) bool, True where a query does not see a key; None if it sees all.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def implementations(case: Case, device: torch.device) -> dict[str, Implementation]:
    """By their names."""
    return {
        EAGER: Implementation(functools.partial(eager, hidden=_hidden(case, device))),
        TORCH: Implementation(functools.partial(F.scaled_dot_product_attention, is_causal=case.causal)),
        OURS: Implementation(functools.partial(_ours, causal=case.causal), heads_first=False),
    }


def _ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    return attention(query, key, value, mask=Mask.causal() if causal else Mask.bidirectional())[0]


def _hidden(case: Case, device: torch.device) -> Tensor | None:
    return torch.ones(case.tokens, case.tokens, dtype=torch.bool, device=device).triu(1) if case.causal else None


def measure(options: Options) -> Iterator[Report]:
    """Rows of every implementation, after every case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    report = Report([], "", {"dtype": str(dtype).removeprefix("torch."), "tolerance": TOLERANCE})
    report.draw = functools.partial(draw, report)
    if device.type == "cpu":
        print("no GPU here: fp32 in place of fp16, which CPUs are slower at, and one sequence at a time")
    for case in cases(options.tokens or LENGTHS, device):
        if options.cases not in case.name:
            continue
        _measure_case(case, device, dtype, options.repeats or REPEATS[device.type], report)
        report.table = table(report)
        yield report


def cases(lengths: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    """Every length alone, and on GPUs in a batch of TOTAL tokens."""
    for causal in (False, True):
        for tokens in lengths:
            batches = {1, max(1, TOTAL // tokens)} if device.type == "cuda" else {1}
            yield from (Case(causal, batch, tokens) for batch in sorted(batches))


def _measure_case(case: Case, device: torch.device, dtype: torch.dtype, repeats: int, report: Report) -> None:
    """Add a case's rows, or why there are none, to the report."""
    torch.manual_seed(0)
    inputs = [torch.randn(case.batch, case.tokens, HEADS, DIM, device=device).to(dtype) for _ in range(4)]
    one = Case(case.causal, 1, case.tokens)
    if reason := lack_of_memory(one.pairs_bytes(torch.float32), device):
        report.skipped.append(
            Skipped("all", case.name, f"eager attention in fp32, which they are checked by, {reason}")
        )
        return
    truth = _expected(inputs, _hidden(case, device))
    found, differences = implementations(case, device), {}
    if reason := lack_of_memory(case.pairs_bytes(dtype), device):
        report.skipped.append(Skipped(EAGER, case.name, f"for its scores {reason}"))
        del found[EAGER]
    for name, implementation in found.items():
        differences[name] = _differences(_results(implementation, inputs), truth)
    del truth
    for direction, difference in differences[OURS].items():
        if not difference <= TOLERANCE:  # also where it is no number
            report.wrong.append(
                f"{OURS} {case.name} {direction} differs from eager attention in fp32 by {difference:.2e}; allowed is "
                f"{TOLERANCE:.0e}"
            )
            found.pop(OURS, None)
    for direction in DIRECTIONS:
        runs = {name: timer_of(_run(x, inputs, direction), device) for name, x in found.items()}
        times = in_turn(runs, repeats)
        for name, milliseconds in times.items():
            ratio = times[EAGER] / milliseconds if EAGER in times else None
            row = Row(
                name, case.name, case.causal, case.batch, case.tokens, direction, milliseconds, ratio,
                differences[name][direction],
            )  # fmt: skip
            report.rows.append(row)
            print(f"{name:12s} {case.name:20s} {direction:8s} {milliseconds:10.3f} ms", flush=True)


def _laid_out(implementation: Implementation, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Query, key and value as leaves, and the gradient of out, as an implementation has them."""
    *leaves, dout = ((x.transpose(1, 2) if implementation.heads_first else x).contiguous().detach() for x in inputs)
    return [x.requires_grad_() for x in leaves], dout


def _run(implementation: Implementation, inputs: list[Tensor], direction: str) -> Callable[[], object]:
    leaves, dout = _laid_out(implementation, inputs)

    def forward() -> None:
        with torch.no_grad():
            implementation.attend(*leaves)

    def forward_backward() -> None:
        torch.autograd.grad(implementation.attend(*leaves), leaves, dout)

    return forward if direction == "fwd" else forward_backward


def _results(implementation: Implementation, inputs: list[Tensor]) -> list[Tensor]:
    """Out and the gradients of query, key and value, (B, T, H, D)."""
    leaves, dout = _laid_out(implementation, inputs)
    out = implementation.attend(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return [x.transpose(1, 2) for x in found] if implementation.heads_first else found


def _expected(inputs: list[Tensor], hidden: Tensor | None) -> list[Tensor]:
    """The same of eager attention in fp32, sequence by sequence, which takes less memory than all at once."""
    attention = Implementation(functools.partial(eager, hidden=hidden))
    sequences = zip(*(x.float().split(1) for x in inputs), strict=True)
    found = [_results(attention, list(sequence)) for sequence in sequences]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _differences(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """By direction; see the head of this file."""
    shares = [
        float((x.float() - expected).abs().max() / expected.abs().max().clamp(min=1))
        for x, expected in zip(found, truth, strict=True)
    ]
    return {"fwd": shares[0], "fwd+bwd": max(shares[1:])}


# Table and picture


def table(report: Report) -> str:
    """A line for each case and direction: milliseconds, times eager, and differences from eager in fp32."""
    names = (EAGER, TORCH, OURS)
    head = [f"{name}, {what}" for what, some in (("ms", names), ("x", names[1:]), ("diff", names)) for name in some]
    text = [f"{'case':20s} {'':8s} " + " ".join(f"{x:>16s}" for x in head)]
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report.rows:
        lines.setdefault((row.case, row.direction), {})[row.implementation] = row
    for (case, direction), found in lines.items():
        cells = [f"{found[x].milliseconds:16.3f}" if x in found else f"{'-':>16s}" for x in names]
        ratios = [found[x].times_eager if x in found else None for x in names[1:]]
        cells += [f"{'-':>16s}" if ratio is None else f"{ratio:16.2f}" for ratio in ratios]
        cells += [f"{found[x].difference:16.1e}" if x in found else f"{'-':>16s}" for x in names]
        text.append(f"{case:20s} {direction:8s} " + " ".join(cells))
    text.append(
        f"{device_name()}, {report.settings['dtype']}, {HEADS} heads of {DIM}; x: how many times as fast as eager"
    )
    return "\n".join(text)


def draw(report: Report, path: Path) -> None:
    """Times as fast as eager by length: a panel for each direction, of one sequence and of a batch."""
    lengths = sorted({row.tokens for row in report.rows})
    batches = {"one sequence": lambda row: row.batch == 1, f"a batch of {TOTAL:,} tokens": lambda row: row.batch > 1}
    shown = {title: rows for title, among in batches.items() if (rows := [row for row in report.rows if among(row)])}
    figure = Figure(figsize=(5.5 * len(shown), 7.5))
    panels = figure.subplots(2, len(shown), sharex=True, squeeze=False)
    for column, (title, rows) in enumerate(shown.items()):
        for line, direction in enumerate(DIRECTIONS):
            _draw_panel(panels[line][column], [row for row in rows if row.direction == direction], lengths)
            panels[line][column].set_title(f"{title}, {'forward' if direction == 'fwd' else 'forward and backward'}")
    panels[0][0].legend()
    panels[-1][0].set_xlabel("tokens")
    figure.suptitle(
        f"Times as fast as eager softmax attention\n{device_name()}, {report.settings['dtype']}, {HEADS} heads of {DIM}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _draw_panel(panel: Axes, rows: list[Row], lengths: list[int]) -> None:
    panel.axhline(1, color="grey", linewidth=1, label=EAGER)
    for colour, name in (("C0", OURS), ("C1", TORCH)):
        for style, causal in (("o-", False), ("o--", True)):
            points = [
                (lengths.index(row.tokens), row.times_eager)
                for row in rows
                if (row.implementation, row.causal) == (name, causal) and row.times_eager is not None
            ]
            if points:
                label = f"{name}, {'causal' if causal else 'full'}"
                panel.plot(*zip(*points, strict=True), f"{colour}{style}", label=label)
    panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    panel.set_ylim(0, 1.05 * panel.dataLim.ymax)
    panel.grid(alpha=0.3)
