"""Times attention beside its peers on this machine and writes a table and a JSON file.

    python launch/benchmark.py suite=kernels                              # one GPU: our kernels, cuDNN, FA2, Flex, ...
    torchrun --nproc-per-node 4 launch/benchmark.py suite=ring            # many: the ring, Ulysses, torch's own

Options are key=value: `suite`, `out` (JSON path), `tokens` (lengths, comma-separated), `cases` (a word in the names of
those to run), `repeats`. Peers whose packages are not installed are named and left out. Times are medians of CUDA
events, the slowest rank's where there are several; backward counts 2.5 times the forward's operations, a causal mask
half of a full one.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path

import torch
import torch.cuda.nccl

SUITES = ("kernels", "ring")


@dataclass
class Options:
    """Command line of the benchmark."""

    suite: str = "kernels"
    out: str = ""
    tokens: str = ""
    cases: str = ""
    repeats: int = 20


@dataclass(frozen=True)
class Row:
    """One measurement: TFLOP/s on one GPU."""

    implementation: str
    case: str
    tokens: int
    direction: str
    milliseconds: float
    tflops: float


def parse(arguments: list[str]) -> Options:
    """Options from key=value words; exits with the allowed keys on a wrong one."""
    options = Options()
    allowed = [field.name for field in fields(Options)]
    for word in arguments:
        key, _, value = word.partition("=")
        if key not in allowed:
            raise SystemExit(f"{word}: allowed are {', '.join(f'{name}=...' for name in allowed)}")
        setattr(options, key, type(getattr(options, key))(value))
    if options.suite not in SUITES:
        raise SystemExit(f"suite={options.suite}: allowed are {', '.join(SUITES)}")
    return options


def machine() -> dict[str, object]:
    """What the figures depend on: device, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "commit": commit.stdout.strip(),
        "command": " ".join(["launch/benchmark.py", *(x for x in sys.argv[1:] if not x.startswith("out="))]),
    }


def print_table(rows: list[Row]) -> None:
    """Implementations as columns, cases as lines."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    print(f"{'case':34s} {'tokens':>8s} {'':8s} " + " ".join(f"{name:>17s}" for name in names))
    lines: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.case, row.tokens, row.direction), {})[row.implementation] = row.tflops
    for (case, tokens, direction), found in lines.items():
        cells = " ".join(f"{found[name]:17.0f}" if name in found else f"{'-':>17s}" for name in names)
        print(f"{case:34s} {tokens:8d} {direction:8s} {cells}")


def main() -> None:
    """Run a suite and write what it measured."""
    options = parse(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a GPU; `python launch/doctor.py` says what this machine has")
    suite = import_module(f"ringflash.launch.benchmark_{options.suite}")
    rows = suite.measure(options)
    if rows is None:
        return
    print_table(rows)
    path = Path(options.out or f"benchmark_{options.suite}.json")
    path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
