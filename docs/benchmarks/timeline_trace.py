"""Reads what a GPU did during attention over several ranks from the Chrome trace of torch.profiler; see timeline.py.

A trace has two calls, annotated as PASSES. Before each, the GPU is kept busy and ranks meet in a collective, under the
name of LEAD; when that has ended, the clock of the call begins. The host waits for the GPU before the next LEAD, so
what the GPU begins between two of them belongs to one call. Times are microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

PASSES = ("forward", "backward")
LEAD = "lead of "
"""In front of a pass's name: what the host does before it."""
METADATA = "ringflash"
"""Key of a trace under which timeline.py notes what the profiler does not know."""

ATTENTION = (
    "attend_kernel", "attend_backward_kernel", "attend_backward_wide_kernel", "attend_backward_split_kernel",
    "attend_narrow_kernel", "dquery_narrow_kernel", "dkey_narrow_kernel",
    "attend_widest_kernel", "dvalue_widest_kernel", "dscores_widest_kernel", "dquery_kernel", "dkey_kernel",
)  # fmt: skip
KERNELS = ("attention", "other kernel")
"""Kinds of events that hold SMs; NCCL's hold some of them, and count as copies."""
COPIES = ("copy", "nccl", "own copy")
FLAG = 64
"""Bytes: copies that are no more tell a rank something, and carry no rows."""


@dataclass(frozen=True)
class Event:
    """Something that a GPU did.

    Attributes:
        name: short.
        kind: "attention", "other kernel", "copy" between GPUs, "own copy" within this one, "nccl", or "flag".
        begin: microseconds since the call's clock began.
        end: likewise.
        launched: when the host asked for it; None where the profiler has not seen that, as of the driver's copies.
        stage: of the plan, for attention; None where launches cannot be told apart.
    """

    name: str
    kind: str
    begin: float
    end: float
    launched: float | None = None
    stage: int | None = None

    def __str__(self) -> str:
        return self.name if self.stage is None else f"{self.name} of stage {self.stage}"


@dataclass(frozen=True)
class Pass:
    """One call on one rank.

    Attributes:
        zero: when its clock began, in microseconds since the epoch.
        events: in order of their beginnings.
        host: microseconds until the call returned to who made it, under the profiler.
    """

    zero: float
    events: tuple[Event, ...]
    host: float

    @property
    def end(self) -> float:
        """When the last event ended."""
        return max((x.end for x in self.events), default=0.0)

    def kernels(self) -> list[Event]:
        """Those that hold SMs."""
        return [x for x in self.events if x.kind in KERNELS]

    def since(self, zero: float) -> Pass:
        """The same by a clock that began at `zero`."""
        by = self.zero - zero
        moved = tuple(
            replace(x, begin=x.begin + by, end=x.end + by, launched=None if x.launched is None else x.launched + by)
            for x in self.events
        )
        return replace(self, zero=zero, events=moved)


@dataclass(frozen=True)
class Gap:
    """A time in which no kernel held a rank's SMs.

    Attributes:
        begin: microseconds.
        end: likewise.
        before: the kernel that ended last; None at the beginning.
        after: the kernel that came next.
        copy: the last that ended within the gap.
        late: microseconds of it that passed before the host asked for `after`.
    """

    begin: float
    end: float
    before: Event | None
    after: Event
    copy: Event | None
    late: float

    def __str__(self) -> str:
        between = f"{'the beginning' if self.before is None else self.before} and {self.after}"
        copy = (
            ""
            if self.copy is None
            else f"; {self.copy}, begun at {self.copy.begin:.0f}, ended {self.end - self.copy.end:.0f} before its end"
        )
        late = f"; the host was late by {self.late:.0f}" if self.late > 0 else ""
        return f"{self.end - self.begin:.0f} at {self.begin:.0f} between {between}{copy}{late}"


# From a trace


def read(trace: dict[str, Any]) -> dict[str, Pass]:
    """The calls of a trace, by their names.

    Raises:
        ValueError: it has no such calls; names what is missing.
    """
    events, epoch = trace["traceEvents"], trace.get("baseTimeNanoseconds", 0) / 1e3
    spans = {x["name"]: _span(x) for x in events if x.get("cat") == "user_annotation"}
    wanted = [name for each in PASSES for name in (LEAD + each, each)]
    if absent := [name for name in wanted if name not in spans]:
        raise ValueError(f"the trace has no annotation {', '.join(map(repr, absent))}; it is not one of timeline.py")
    asked = {x["args"]["correlation"]: x["ts"] for x in events if x.get("cat") in ("cuda_runtime", "cuda_driver")}
    done = sorted((x for x in events if x.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda x: x["ts"])
    stages = trace.get(METADATA, {}).get("stages", {})
    found = {}
    for name, following in zip(PASSES, (*(spans[LEAD + x][0] for x in PASSES[1:]), float("inf")), strict=True):
        first, last = spans[LEAD + name]
        mine = [(x, asked.get(x["args"].get("correlation"))) for x in done if first <= x["ts"] < following]
        lead = [x for x, launched in mine if launched is not None and first <= launched <= last]
        if not lead:
            raise ValueError(f"the trace has nothing on the GPU under {LEAD + name!r}, where ranks meet")
        zero = max(_span(x)[1] for x in lead)
        met = {id(x) for x in lead}
        of_call = [_event(x, launched, zero) for x, launched in mine if id(x) not in met]
        begin, end = spans[name]
        found[name] = Pass(epoch + zero, _with_stages(of_call, stages.get(name, [])), end - begin)
    return found


def _span(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _event(event: dict[str, Any], launched: float | None, zero: float) -> Event:
    begin, end = _span(event)
    name, kind = _name_and_kind(event)
    return Event(name, kind, begin - zero, end - zero, None if launched is None else launched - zero)


def _name_and_kind(event: dict[str, Any]) -> tuple[str, str]:
    name, args = event["name"], event["args"]
    if event["cat"] == "gpu_memcpy":
        if args["bytes"] <= FLAG:
            return "flag", "flag"
        amount = f"copy of {_bytes(args['bytes'])}"
        if "fromDevice" in args and args["fromDevice"] != args["toDevice"]:
            return f"{amount} from GPU {args['fromDevice']} to {args['toDevice']}", "copy"
        return amount, "own copy"
    short = re.sub(r"^void ", "", name).split("<")[0].split("(")[0].rpartition("::")[2].strip()
    if "nccl" in name.lower():
        return short, "nccl"
    if short in ATTENTION:
        return short, "attention"
    what = re.search(r"\w*Functor\w*|\w+_kernel_cuda", name)  # of torch's elementwise kernels
    return f"{short} {what[0]}" if what else short, "other kernel"


def _bytes(amount: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount} B"


def _with_stages(events: list[Event], stages: Sequence[int]) -> tuple[Event, ...]:
    """Attention by the stages of its launches, in their order: as many kernels each, or nothing is known."""
    attention = [x for x in events if x.kind == "attention"]
    if not stages or not attention or len(attention) % len(stages):
        return tuple(events)
    each = len(attention) // len(stages)
    of = {id(x): stages[number // each] for number, x in enumerate(attention)}
    return tuple(replace(x, stage=of.get(id(x))) for x in events)


def on_one_clock(ranks: Sequence[dict[str, Pass]]) -> tuple[list[dict[str, Pass]], dict[str, float]]:
    """All ranks' calls by the clock of the first to begin, and how far apart their clocks began, by calls.

    The ranks are on one host, whose time the traces are in.
    """
    zeros = {name: [each[name].zero for each in ranks] for name in PASSES}
    moved = [{name: each[name].since(min(zeros[name])) for name in PASSES} for each in ranks]
    return moved, {name: max(x) - min(x) for name, x in zeros.items()}


# What it says


def covered(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The times in which any of them runs, apart and in order."""
    spans: list[tuple[float, float]] = []
    for x in sorted(events, key=lambda x: x.begin):
        if spans and x.begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], x.end)
        else:
            spans.append((x.begin, x.end))
    return spans


def length(spans: Iterable[tuple[float, float]]) -> float:
    """Of them together, microseconds."""
    return sum(end - begin for begin, end in spans)


def gaps(events: Sequence[Event], least: float = 10.0) -> list[Gap]:
    """Of at least so many microseconds until a rank's last kernel, the longest first."""
    kernels = sorted((x for x in events if x.kind in KERNELS), key=lambda x: x.begin)
    copies = [x for x in events if x.kind in COPIES]
    edges = [(0.0, 0.0), *((begin, end) for begin, end in covered(kernels) if end > 0)]
    found = []
    for (_, begin), (end, _) in pairwise(edges):
        if end - begin < least:
            continue
        before = max((x for x in kernels if x.end <= begin), key=lambda x: x.end, default=None)
        after = next(x for x in kernels if x.begin == end)
        copy = max((x for x in copies if begin < x.end <= end), key=lambda x: x.end, default=None)
        late = 0.0 if after.launched is None else min(after.launched, end) - begin
        found.append(Gap(begin, end, before, after, copy, max(0.0, late)))
    return sorted(found, key=lambda x: x.begin - x.end)


def table(ranks: Sequence[dict[str, Pass]], hosts: Sequence[dict[str, float]], shown: int = 4) -> str:
    """For each call a line for each rank, and its longest gaps.

    Args:
        ranks: on one clock.
        hosts: microseconds of the calls on the host of each rank, without the profiler.
        shown: gaps of each rank.
    """
    lines = []
    for name in PASSES:
        end = max(each[name].end for each in ranks)
        lines += [f"{name}: {end:,.0f} us until the last rank is done; in us", _row(HEADINGS)]
        for rank, (each, host) in enumerate(zip(ranks, hosts, strict=True)):
            kernels = length(covered(each[name].kernels()))
            figures = [
                each[name].end,
                length(covered(x for x in each[name].events if x.kind == "attention")),
                length(covered(x for x in each[name].events if x.kind == "other kernel")),
                length(covered(x for x in each[name].events if x.kind in COPIES)),
                host[name],
            ]
            cells = [f"{x:,.0f}" for x in figures]
            lines.append(_row((str(rank), cells[0], f"{kernels / end:.1%}", *cells[1:])))
        for rank, each in enumerate(ranks):
            lines += [f"  rank {rank}: {gap}" for gap in gaps(each[name].events)[:shown]]
        lines.append("")
    return "\n".join(lines[:-1])


HEADINGS = ("rank", "done", "SMs busy", "attention", "other kernels", "copies", "host")


def _row(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{max(9, len(heading))}s}" for cell, heading in zip(cells, HEADINGS, strict=True))
