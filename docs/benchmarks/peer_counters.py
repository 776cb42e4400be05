"""Cycles of whole passes by hardware counter, ours beside FlashAttention-4: all kernels of a pass, its small ones too.

    python docs/benchmarks/peer_counters.py out.json    # needs ncu (Nsight Compute), a GPU and flash_attn.cute

Starts itself under ncu. Unlike times, cycles do not depend on how warm the card is.
"""

from __future__ import annotations

import json
import sys

import counters

METRICS = counters.METRICS | {"instructions": "smsp__inst_executed.sum"}
CASES = {  # name: sequences, tokens, heads, head dimension, causal
    "full, 2 x 16,384": (2, 16384, 16, 128, False),
    "causal, 4 x 8,192": (4, 8192, 16, 128, True),
    "full, 4 x 8,192": (4, 8192, 32, 64, False),
}
FIRST_KERNELS = {  # of each pass, in the order of `launch_all`, by a part of its name
    ("ringflash", "forward"): "attend_kernel",
    ("ringflash", "backward"): "find_rows_kernel",
    ("FlashAttention-4", "forward"): "FlashAttentionForwar",
    ("FlashAttention-4", "backward"): "bwd_preprocess",
}


def launch_all() -> None:
    """Every pass of every case, once."""
    import torch
    from flash_attn.cute import flash_attn_func

    from ringflash import Mask
    from ringflash.functional import attention

    profiler = torch.cuda.cudart()
    for sequences, tokens, heads, dim, causal in CASES.values():
        shape = (sequences, tokens, heads, dim)
        leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        mask = Mask.causal() if causal else Mask.bidirectional()
        for attend in (
            lambda *leaves, mask=mask: attention(*leaves, mask=mask, kernel="hopper"),
            lambda *leaves, causal=causal: flash_attn_func(*leaves, causal=causal),
        ):
            out = attend(*leaves)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
            torch.cuda.synchronize()
            profiler.cudaProfilerStart()
            attend(*leaves)
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
            torch.cuda.synchronize()
            profiler.cudaProfilerStop()


def rows_of(kernels: list[dict]) -> list[dict]:
    """One row for each pass: sums over its kernels, and the tensor cores' share of the longest of them."""
    passes = [(case, *key) for case in CASES for key in FIRST_KERNELS]
    rows: list[dict] = []
    for kernel in kernels:
        begins = len(rows) < len(passes) and FIRST_KERNELS[passes[len(rows)][1:]] in kernel["kernel"]
        if begins:
            case, implementation, direction = passes[len(rows)]
            label = {"head_dim": CASES[case][3], "case": case, "direction": direction, "implementation": implementation}
            rows.append({**label, **dict.fromkeys(METRICS, 0.0), "longest": 0.0})
        row = rows[-1]
        if kernel["cycles"] > row["longest"]:
            row["longest"], row["tensor_percent"] = kernel["cycles"], kernel["tensor_percent"]
        for name in ("cycles", "ms", "instructions"):
            row[name] += kernel[name] / (1e6 if name == "ms" else 1)
    if len(rows) != len(passes):
        raise RuntimeError(f"{len(rows)} passes were found and {len(passes)} made")
    return [{name: x for name, x in row.items() if name != "longest"} for row in rows]


def main() -> None:
    if sys.argv[1:] == ["--launch"]:
        launch_all()
        return
    _, kernels = counters.run_under_ncu(METRICS, ["--profile-from-start", "off"], [__file__, "--launch"])
    rows = rows_of(kernels)
    for row in rows:
        label = f"D{row['head_dim']} {row['case']} {row['direction']}, {row['implementation']}"
        print(
            f"{label:56s} {row['cycles'] / 1e6:7.3f} M cycles {row['ms']:7.3f} ms, "
            f"tensor {row['tensor_percent']:.0f}%, {row['instructions'] / 1e9:.2f} G instructions"
        )
    if sys.argv[1:]:
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file, indent=0)


if __name__ == "__main__":
    main()
