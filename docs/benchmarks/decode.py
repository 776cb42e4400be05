"""Time attention of one new token to a cache, beside what torch ships and beside copying memory, on one GPU.

    python docs/benchmarks/decode.py --out docs/benchmarks
    python docs/benchmarks/decode.py --sweep   # block shapes and parts, for kernels/triton/decode_tiles.py

Writes decode.json and decode.md. 32 query heads on 8 key heads of 128, bfloat16. A figure is the bytes of keys and
values divided by the median time, the second-level cache emptied before each repeat, and stands beside the figure of
a copy of 2 GiB (read and written). Implementations take turns over rounds, each in a CUDA graph, as decoding runs; the
column "called" is ours without a graph, where launching from Python can be what is measured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from ringflash import flash_attn_with_kvcache
from ringflash.kernels.decode import Cache, Rules
from ringflash.kernels.triton import decode
from ringflash.kernels.triton.decode_tiles import DecodeTiles

CASES = [(1, 8192), (1, 32768), (1, 65536), (1, 131072), (4, 8192), (16, 8192), (16, 65536), (64, 8192)]
HEADS, KEY_HEADS, DIM = 32, 8, 128
OURS, PAGED, CALLED = "ringflash", "ringflash, pages of 256", "ringflash, called"
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
COLUMNS = (OURS, PAGED, CALLED, *BACKENDS)


def gigabytes_per_second(size: int, run: Callable[[], object]) -> float:
    return size / do_bench(run, warmup=20, rep=100, return_mode="median") / 1e6


def copy_bandwidth() -> float:
    """GB/s read and written by a copy."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return gigabytes_per_second(2 * x.numel(), lambda: y.copy_(x))


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """A replay of what `run` launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(inputs: Callable[[], object] = run) -> None:  # a graph does not keep the tensors that it reads
        graph.replay()

    return replay


def ours(batch: int, length: int, page: int | None) -> Callable[[], object]:
    """A call with lengths on the device; pages lie in random order."""
    q = torch.randn(batch, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    shape = (batch, length) if page is None else (batch * length // page, page)
    k_cache, v_cache = (torch.randn(*shape, KEY_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seqlens = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    table = None if page is None else torch.randperm(shape[0], device="cuda").view(batch, -1).int()
    return lambda: flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=seqlens, block_table=table, causal=True
    )  # fmt: skip


def torchs(batch: int, length: int, backend: SDPBackend) -> Callable[[], object]:
    """torch's attention, with keys and values in the layout it likes best."""
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, KEY_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def run() -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def implementation(column: str, batch: int, length: int) -> Callable[[], object]:
    if column in BACKENDS:
        return graphed(torchs(batch, length, BACKENDS[column]))
    run = ours(batch, length, 256 if column == PAGED else None)
    return run if column == CALLED else graphed(run)


def measure(batch: int, length: int, rounds: int, copy: float) -> list[dict]:
    """One row for each implementation; "math" expands keys and values, so long caches are left out."""
    size = 2 * batch * length * KEY_HEADS * DIM * 2
    found: dict[str, list[float]] = {}
    for _, column in itertools.product(range(rounds), COLUMNS):
        if column == "math" and batch * length > 2**18:
            continue
        found.setdefault(column, []).append(gigabytes_per_second(size, implementation(column, batch, length)))
        torch.cuda.empty_cache()
    return [
        {
            "implementation": column,
            "batch": batch,
            "length": length,
            "microseconds": size / statistics.median(figures) / 1e3,
            "gigabytes_per_second": statistics.median(figures),
            "share_of_copy": statistics.median(figures) / copy,
        }
        for column, figures in found.items()
    ]


def table(rows: list[dict], machine: dict) -> str:
    """Markdown of all rows."""
    lines = [
        "# Decoding: one token against a cache",
        "",
        f"Microseconds (share of copy bandwidth), {HEADS} query heads on {KEY_HEADS} key heads of {DIM}, bfloat16; "
        + ", ".join(f"{name} {value}" for name, value in machine.items())
        + ".",
        "",
        "| batch x cache | " + " | ".join(COLUMNS) + " | speed over the fastest of torch | paged over contiguous |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for batch, length in dict.fromkeys((row["batch"], row["length"]) for row in rows):
        times = {x["implementation"]: x for x in rows if (x["batch"], x["length"]) == (batch, length)}
        cells = [
            f"{times[c]['microseconds']:.1f} ({times[c]['share_of_copy']:.0%})" if c in times else "-" for c in COLUMNS
        ]
        fastest = min(times[c]["microseconds"] for c in BACKENDS if c in times)
        cells.append(f"{fastest / times[OURS]['microseconds']:.2f}")
        cells.append(f"{times[PAGED]['microseconds'] / times[OURS]['microseconds']:.2f}")
        lines.append(f"| {batch} x {length} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


SHAPES = [
    (64, 4, 3, 2), (64, 4, 4, 2), (64, 4, 6, 1), (128, 4, 3, 1), (128, 8, 3, 1),
]  # fmt: skip


def sweep(copy: float) -> None:
    """Share of copy bandwidth of block shapes (keys, warps, stages, programs sharing a multiprocessor) and parts."""
    for batch, length in ((1, 8192), (1, 65536), (16, 8192), (64, 8192)):
        size = 2 * batch * length * KEY_HEADS * DIM * 2
        q = torch.randn(batch, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, length, KEY_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache, rules = Cache(k, v, None, length), Rules(DIM**-0.5)
        for shape in SHAPES:
            tiles = DecodeTiles(*shape)
            slots = decode.multiprocessors(q.device) * tiles.resident
            waves = {max(1, min(128, round(w * slots / (batch * KEY_HEADS)))) for w in (0.5, 1, 2, 4, 8)}
            found = {}
            for splits in sorted(waves):
                run = graphed(functools.partial(decode.launch, q, cache, rules, None, 0, splits, tiles, 16))
                found[splits] = f"{size / do_bench(run, warmup=5, rep=20, return_mode='median') / 1e6 / copy:.2f}"
            print(f"{batch} x {length}", shape, found, flush=True)


def commit_of_checkout() -> str:
    """Short hash, "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> None:
    """Measure every case and write the tables, or sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for decode.json and decode.md")
    parser.add_argument("--rounds", type=int, default=2, help="how often the implementations take turns")
    parser.add_argument("--commit", default=commit_of_checkout(), help="recorded in the tables")
    parser.add_argument("--sweep", action="store_true", help="print block shapes instead")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    torch.cuda.empty_cache()
    if arguments.sweep:
        sweep(copy)
        return
    machine = {
        "device": torch.cuda.get_device_name(),
        "copy GB/s": round(copy),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuDNN": torch.backends.cudnn.version(),
        "commit": arguments.commit,
        "command": f"python docs/benchmarks/decode.py --rounds {arguments.rounds}",
    }
    rows = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for batch, length in CASES:
        rows += measure(batch, length, arguments.rounds, copy)
        (arguments.out / "decode.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        (arguments.out / "decode.md").write_text(table(rows, machine))
    print(table(rows, machine))


if __name__ == "__main__":
    main()
