"""Time the portable Triton kernels beside what torch ships, on one GPU, in one process.

    python docs/benchmarks/portable.py --out portable.json

Prints a table, and writes every figure where --out says. Backward includes the row sums of dout * out; its operations
count 2.5 x forward's and a causal mask counts half. Every figure is the median over repeats, then over rounds in which
the implementations take turns, so that none of them has the chip cool for itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.triton import attend as kernels

# heads, key heads, head dimension, batch, length, causal
CASES = [
    (16, 16, 128, 2, 16384, True),
    (16, 16, 128, 2, 16384, False),
    (32, 32, 64, 2, 16384, True),
    (32, 32, 64, 2, 16384, False),
    (8, 8, 256, 2, 16384, True),
    (8, 8, 256, 2, 16384, False),
    (32, 8, 128, 2, 16384, True),
    (16, 16, 128, 16, 2048, True),
]
COLUMNS = ("ringflash triton", "FlexAttention", "cuDNN", "FlashAttention-2")
Passes = tuple[Callable[[], object], Callable[[], object]]


def ringflash_passes(heads: int, key_heads: int, dim: int, batch: int, length: int, causal: bool) -> Passes:
    """Forward and backward of our kernels: `batch` documents laid end to end."""
    query, key, value, dout = (
        torch.randn(batch * length, h, dim, device="cuda", dtype=torch.bfloat16)
        for h in (heads, key_heads, key_heads, heads)
    )
    row = torch.arange(batch * length, device="cuda", dtype=torch.int32)
    start = row // length * length
    intervals = KeyIntervals(start, row + 1 if causal else start + length, batch * length)
    scale = dim**-0.5
    out, lse = kernels.attend(query, key, value, intervals, scale=scale)

    def backward() -> object:
        delta = kernels.row_delta(dout, out)
        return kernels.attend_backward(dout, query, key, value, lse, delta, intervals, scale=scale)

    return lambda: kernels.attend(query, key, value, intervals, scale=scale), backward


def torch_passes(
    heads: int, key_heads: int, dim: int, batch: int, length: int, causal: bool, backend: SDPBackend | None
) -> Passes:
    """Forward and backward of one of torch's fused kernels, of FlexAttention where `backend` is None."""
    query, key, value = (
        torch.randn(batch, h, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    )
    grouped = heads != key_heads
    if backend is None:
        flex = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, "cuda") if causal else None

        def forward() -> torch.Tensor:
            return flex(query, key, value, block_mask=mask, enable_gqa=grouped)
    else:

        def forward() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    out = forward()
    dout = torch.randn_like(out)
    return forward, lambda: torch.autograd.grad(out, (query, key, value), dout, retain_graph=True)


def passes(column: str, case: tuple) -> Passes:
    """Forward and backward of a column's implementation."""
    if column == "ringflash triton":
        return ringflash_passes(*case)
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
    return torch_passes(*case, backends.get(column))


def measure(case: tuple, rounds: int) -> list[dict]:
    """Rows of all implementations for one case; FlexAttention is compared up to D128."""
    heads, key_heads, dim, batch, length, causal = case
    columns = [column for column in COLUMNS if not (column == "FlexAttention" and dim > 128)]
    flops = 4 * batch * heads * length**2 * dim * (0.5 if causal else 1.0)
    implementations = {column: passes(column, case) for column in columns}
    times = {}
    for _ in range(rounds):
        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            for column in columns:
                run = implementations[column][direction == "backward"]
                milliseconds = do_bench(run, warmup=20, rep=80, return_mode="median")
                times.setdefault((column, direction, factor), []).append(milliseconds)
    return [
        {
            "implementation": column,
            "direction": direction,
            "heads": heads,
            "key_heads": key_heads,
            "head_dim": dim,
            "batch": batch,
            "length": length,
            "causal": causal,
            "milliseconds": statistics.median(values),
            "tflops": factor * flops / statistics.median(values) / 1e9,
        }
        for (column, direction, factor), values in times.items()
    ]


def table(rows: list[dict], machine: dict) -> str:
    """Markdown of all rows: TFLOP/s forward / backward."""
    lines = [
        "# Portable Triton kernels beside torch's",
        "",
        "TFLOP/s forward / backward, bfloat16; "
        + ", ".join(f"{name} {value}" for name, value in machine.items())
        + ".",
        "",
        "| heads / key heads, D, batch x length, mask | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    cells = {}
    for row in rows:
        mask = "causal" if row["causal"] else "full"
        name = f"{row['heads']}/{row['key_heads']}, {row['head_dim']}, {row['batch']} x {row['length']}, {mask}"
        cells.setdefault(name, {}).setdefault(row["implementation"], []).append(f"{row['tflops']:.0f}")
    for name, columns in cells.items():
        lines.append(f"| {name} | " + " | ".join(" / ".join(columns.get(column, ["-"])) for column in COLUMNS) + " |")
    return "\n".join([*lines, ""])


def commit_of_checkout() -> str:
    """Short hash, "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> None:
    """Measure every case and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("portable.json"), help="file for every figure")
    parser.add_argument("--rounds", type=int, default=2, help="how often the implementations take turns")
    parser.add_argument("--commit", default=commit_of_checkout(), help="recorded in the tables")
    arguments = parser.parse_args()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuDNN": torch.backends.cudnn.version(),
        "commit": arguments.commit,
        "command": f"python docs/benchmarks/portable.py --rounds {arguments.rounds}",
    }
    rows = []
    for case in CASES:
        rows += measure(case, arguments.rounds)
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(table(rows, machine))


if __name__ == "__main__":
    main()
