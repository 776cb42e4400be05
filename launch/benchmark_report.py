"""What a suite hands back: rows of figures, and what there is to say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement of attention: TFLOP/s on one GPU."""

    implementation: str
    case: str
    tokens: int
    direction: str
    milliseconds: float
    tflops: float


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    implementation: str
    case: str
    reason: str


@dataclass
class Report:
    """What is known so far.

    Attributes:
        rows: dataclasses of one kind, one for each figure.
        table: the rows as text.
        settings: what the figures depend on beside the machine and the command.
        skipped: what was not measured.
        wrong: a line for each implementation that is not as exact as it has to be; the command then fails.
        draw: writes a picture of the rows into a PNG file; None for suites without one.
    """

    rows: list[Any]
    table: str
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    draw: Callable[[Path], None] | None = None


def table_of_speeds(rows: list[Row]) -> str:
    """Implementations as columns, cases as lines, TFLOP/s."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    text = [f"{'case':34s} {'tokens':>8s} {'':8s} " + " ".join(f"{name:>17s}" for name in names)]
    lines: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.case, row.tokens, row.direction), {})[row.implementation] = row.tflops
    for (case, tokens, direction), found in lines.items():
        cells = " ".join(f"{found[name]:17.0f}" if name in found else f"{'-':>17s}" for name in names)
        text.append(f"{case:34s} {tokens:8d} {direction:8s} {cells}")
    return "\n".join(text)
