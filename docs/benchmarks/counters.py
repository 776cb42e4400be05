"""Cycles of the Hopper kernels by hardware counter, which unlike times do not depend on how warm the card is.

    python docs/benchmarks/counters.py backward 64,128,256 out.json    # needs ncu (Nsight Compute) and a GPU

Starts itself under ncu with few launches of each case, and prints the least cycles, the time at the clock of that
moment, and the share of cycles in which the tensor cores were busy.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys

METRICS = {
    "cycles": "sm__cycles_elapsed.max",
    "ms": "gpu__time_duration.sum",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
}
KERNELS = {"forward": "regex:^attend_kernel$", "backward": "regex:^attend_backward"}
CASES = {  # name: tokens, lengths, causal, heads or None for those of docs/benchmarks/hopper.py
    "full 8192": (8192, [8192], False, None),
    "causal 8192": (8192, [8192], True, None),
    "causal 4 x 2048": (8192, [2048] * 4, True, None),
    "causal 32768, 2 heads": (32768, [32768], True, 2),
}
LAUNCHES = 3


def launch_all(direction: str, dims: list[int]) -> None:
    """Every case LAUNCHES times, a line with its name before each."""
    import torch
    from hopper import (
        HEADS,
        backward_variants,
        document_intervals,
        forward_variants,
        prepared_backward,
        prepared_forward,
        random,
    )

    for dim in dims:
        for name, (tokens, lengths, causal, heads) in CASES.items():
            heads = heads or HEADS[dim]
            intervals = document_intervals(lengths, causal)
            q, k, v, dout = (random((tokens, heads, dim), torch.bfloat16) for _ in range(4))
            lse, delta = 8 + torch.rand(heads, tokens, device="cuda"), torch.randn(heads, tokens, device="cuda")
            variants = forward_variants(dim) if direction == "forward" else backward_variants(dim)
            for variant, settings in variants.items():
                if direction == "forward":
                    launch = prepared_forward(q, k, v, intervals, settings)
                else:
                    launch = prepared_backward(dout, q, k, v, lse, delta, intervals, None, q.dtype, **settings)
                for _ in range(LAUNCHES):
                    print("CASE", json.dumps({"dim": dim, "case": name, "variant": variant}), flush=True)
                    launch()
    torch.cuda.synchronize()


def run_under_ncu(metrics: dict[str, str], options: list[str], program: list[str]) -> tuple[list[str], list[dict]]:
    """What `program`, a script with its arguments, prints; and of each launch that ncu saw its name and the metrics."""
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--metrics", ",".join(metrics.values()), *options, sys.executable, *program]
    return launches_of(metrics, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def launches_of(metrics: dict[str, str], output: str) -> tuple[list[str], list[dict]]:
    """See `run_under_ncu`, of what ncu printed."""
    lines = output.splitlines()
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"'))))
    launches = [
        {"kernel": row["Kernel Name"]} | {name: float(row[x].replace(",", "")) for name, x in metrics.items()}
        for row in list(table)[1:]  # the first line of the table holds units
    ]
    return [line for line in lines if not line.startswith('"')], launches


def measure(direction: str, dims: str) -> list[dict]:
    """One row for each case: the launch with the least cycles."""
    program = [__file__, direction, dims, "--launch"]
    lines, launches = run_under_ncu(METRICS, ["-k", KERNELS[direction]], program)
    cases = [json.loads(line.removeprefix("CASE ")) for line in lines if line.startswith("CASE ")]
    if len(cases) != len(launches):
        raise RuntimeError(f"{len(cases)} launches were made and {len(launches)} measured")
    least: dict[str, dict] = {}
    for case, launch in zip(cases, launches, strict=True):
        found = {name: launch[name] for name in METRICS}
        found["ms"] /= 1e6
        key = json.dumps(case)
        least[key] = min(least.get(key, case | found), case | found, key=lambda row: row["cycles"])
    return list(least.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=KERNELS)
    parser.add_argument("dims", help="head dimensions, with commas between")
    parser.add_argument("path", nargs="?", help="JSON file for the rows")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    arguments = parser.parse_args()
    if arguments.launch:
        launch_all(arguments.direction, [int(dim) for dim in arguments.dims.split(",")])
        return
    rows = measure(arguments.direction, arguments.dims)
    for row in rows:
        label = f"D{row['dim']} {arguments.direction} {row['case']}, {row['variant']}"
        print(
            f"{label:56s} {row['cycles'] / 1e6:7.3f} M cycles {row['ms']:7.3f} ms, tensor {row['tensor_percent']:.0f}%"
        )
    if arguments.path:
        with open(arguments.path, "w") as file:
            json.dump(rows, file, indent=0)


if __name__ == "__main__":
    main()
