"""Times attention beside its peers on this machine and writes a table, a JSON file and, of some suites, a picture.

    python launch/benchmark.py suite=sdpa                                 # fused attention beside eager softmax
    python launch/benchmark.py suite=prefill                              # one new token of Hugging Face models
    torchrun --nproc-per-node 4 launch/benchmark.py suite=prefill         # the same, its prompt sharded over 4 GPUs
    python launch/benchmark.py suite=kernels                              # one GPU: our kernels, cuDNN, FA2, Flex, ...
    torchrun --nproc-per-node 4 launch/benchmark.py suite=ring            # many: the ring, Ulysses, torch's own
    torchrun --nproc-per-node 4 launch/benchmark.py suite=tax             # what sharded sequences cost training

Options are key=value: `suite`, `out` (JSON path; a folder of its own under runs/ if absent), `tokens` (lengths,
comma-separated), `cases` (a word in the names of those to run), `repeats`, `path` (a Hugging Face model's folder) and
`shrink` (a divisor of models' layers and widths, for CPUs); `SUITES` says which suite takes which. Peers whose packages
are not installed are named and left out. Times are medians, the slowest rank's where there are several. TFLOP/s, of
suites `kernels` and `ring`, count 2.5 times the forward's operations for backward, and half of a full mask's for a
causal one.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ringflash.launch.benchmark_device import machine
from ringflash.launch.benchmark_report import Report


@dataclass(frozen=True)
class Suite:
    """Which options a suite takes beside `suite` and `out`, and whether it runs on CPUs."""

    keys: tuple[str, ...]
    on_cpus: bool = False


SUITES = {
    "kernels": Suite(("tokens", "cases", "repeats")),
    "ring": Suite(("tokens", "cases", "repeats")),
    "tax": Suite(("tokens", "repeats", "shrink"), on_cpus=True),
    "sdpa": Suite(("tokens", "cases", "repeats"), on_cpus=True),
    "prefill": Suite(("tokens", "cases", "repeats", "path", "shrink"), on_cpus=True),
}


@dataclass(frozen=True)
class Options:
    """Command line of the benchmark; what is empty or 0 is the suite's to choose."""

    suite: str = "kernels"
    out: str = ""
    tokens: tuple[int, ...] = ()
    cases: str = ""
    repeats: int = 0
    path: str = ""
    shrink: int = 1


def parse(arguments: list[str]) -> Options:
    """Options from key=value words; exits with what is allowed on a wrong key or value."""
    given = {key: value for key, _, value in (word.partition("=") for word in arguments)}
    suite = given.get("suite", Options.suite)
    if suite not in SUITES:
        raise SystemExit(f"suite={suite}: allowed are {', '.join(SUITES)}")
    allowed = ("suite", "out", *SUITES[suite].keys)
    for key, value in given.items():
        if key not in allowed:
            raise SystemExit(f"{key}={value}: allowed for suite={suite} are {', '.join(f'{x}=...' for x in allowed)}")
    return Options(**{field.name: _value(field.name, given[field.name], field.default) for field in fields(Options)
                      if field.name in given})  # fmt: skip


def _value(key: str, text: str, default: Any) -> Any:
    """A word's value, in the type of the option's default."""
    if isinstance(default, str):
        return text
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or (isinstance(default, int) and len(words) > 1):
        numbers = "a whole number above 0" if isinstance(default, int) else "whole numbers above 0, comma-separated"
        raise SystemExit(f"{key}={text}: allowed is {numbers}")
    return int(text) if isinstance(default, int) else tuple(map(int, words))


def main() -> None:
    """Run a suite and write what it measured."""
    options = parse(sys.argv[1:])
    if not (SUITES[options.suite].on_cpus or torch.cuda.is_available()):
        raise SystemExit(f"suite={options.suite} needs a GPU; `python launch/doctor.py` says what this machine has")
    folder = Path("runs", f"benchmark_{options.suite}", time.strftime("%Y-%m-%d_%H-%M-%S"))
    path = Path(options.out or folder / f"{options.suite}.json")
    report = None
    try:
        for report in import_module(f"ringflash.launch.benchmark_{options.suite}").measure(options):
            write(report, path)
    finally:  # a run that is cut off shows what it has
        if report is not None:  # else another rank has it
            show(report, path)
    if report is not None:
        check(report)


def write(report: Report, path: Path) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    skipped = {"skipped": [asdict(x) for x in report.skipped]} if report.skipped else {}
    rows = [asdict(row) for row in report.rows]
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"machine": machine() | report.settings, "rows": rows} | skipped, indent=1))
    unfinished.replace(path)


def show(report: Report, path: Path) -> None:
    """Draw the figures and print them, the table last."""
    print(f"written to {path}")
    if report.draw is not None and report.rows:
        report.draw(path.with_suffix(".png"))
        print(f"drawn in {path.with_suffix('.png')}")
    for skipped in report.skipped:
        print(f"{skipped.implementation} is left out of {skipped.case}: {skipped.reason}")
    print(f"\n{report.table}", flush=True)


def check(report: Report) -> None:
    """Exit with what is wrong, or if there is nothing."""
    if report.wrong:
        raise SystemExit("\n".join(["", *report.wrong]))
    if not report.rows:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever limits its time ends it as Ctrl-C does
    main()
