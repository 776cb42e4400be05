"""Time attention of one new token to a cache, beside what torch ships and beside copying memory, on one GPU.

    python docs/benchmarks/decode.py --out decode.json
    python docs/benchmarks/decode.py --only 1 16x8192   # cases of batch 1, and one more
    python docs/benchmarks/decode.py --sweep   # block shapes and parts, for kernels/triton/decode/launch_sizes.py

Prints tables, and writes every figure where --out says. 32 query heads on 8 key heads of 128, bfloat16. Every figure
is a median, and stands beside the time that the bytes of keys and values would take in a copy of 2 GiB (read and
written). Implementations take turns over rounds, each in CUDA graphs; the column "called" is ours without a graph,
where launching from Python can be what is measured. There are two tables:

- As decoding runs: a graph of several calls one after the other, as a model's layers, each with a query and a cache of
  its own, of at least 1 GiB together, many times what the second-level cache holds. Time per call, from events around
  many replays.
- After 256 MB of writes: one call at a time by triton's do_bench, which empties the second-level cache by writing. What
  it holds of these writes goes to memory while the call reads, which adds about the same time to whatever is measured
  and so brings all ratios closer to one.
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
from ringflash.kernels.gpu.chips import multiprocessors
from ringflash.kernels.triton.decode import attend_cache
from ringflash.kernels.triton.decode.launch_sizes import LaunchSizes
from ringflash.launch.benchmark_device import timed_by_events

Run = Callable[[], object]
CASES = [(1, 8192), (1, 32768), (1, 65536), (1, 131072), (4, 8192), (16, 8192), (16, 65536), (64, 8192)]
HEADS, KEY_HEADS, DIM = 32, 8, 128
OURS, PAGED, CALLED = "ringflash", "ringflash, pages of 256", "ringflash, called"
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
COLUMNS = (OURS, PAGED, CALLED, *BACKENDS)
DECODING, AFTER_WRITES = "as decoding runs", "after 256 MB of writes"
CACHES, FEWEST_CALLS = 1 << 30, 4
"""Bytes of keys and values and calls that a graph of layers has at least."""
REPEATS, REPEAT_MS = 12, 3.0


def bytes_of_cache(batch: int, length: int) -> int:
    return 2 * batch * length * KEY_HEADS * DIM * 2


def calls_of(batch: int, length: int) -> int:
    """Layers of a graph: fewer than wished if their caches would fill more than half of the free memory."""
    size = bytes_of_cache(batch, length)
    wished = max(FEWEST_CALLS, -(-CACHES // size))
    return max(1, min(wished, torch.cuda.mem_get_info()[0] // 2 // size))


def alone_microseconds(run: Run) -> float:
    return 1e3 * do_bench(run, warmup=20, rep=100, return_mode="median")


def in_turn_microseconds(run: Run) -> float:
    """Median time of `run` among others of its kind."""
    milliseconds = timed_by_events(run)
    runs = max(1, round(REPEAT_MS / milliseconds(2)))
    return 1e3 * statistics.median(milliseconds(runs) for _ in range(REPEATS))


def copy_bandwidth() -> float:
    """GB/s read and written by a copy."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / alone_microseconds(lambda: y.copy_(x)) / 1e3


def one_after_another(runs: list[Run]) -> Run:
    def run() -> None:
        for call in runs:
            call()

    return run


def graphed(run: Run) -> Run:
    """A replay of what `run` launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(inputs: Run = run) -> None:  # a graph does not keep the tensors that it reads
        graph.replay()

    return replay


def ours(batch: int, length: int, calls: int, page: int | None) -> list[Run]:
    """Calls with lengths on the device; pages lie in random order, the same one in every layer."""
    shape = (batch, length) if page is None else (batch * length // page, page)
    seqlens = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    table = None if page is None else torch.randperm(shape[0], device="cuda").view(batch, -1).int()

    def layer() -> Run:
        q = torch.randn(batch, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        k_cache, v_cache = (torch.randn(*shape, KEY_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return lambda: flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=seqlens, block_table=table, causal=True
        )  # fmt: skip

    return [layer() for _ in range(calls)]


def torchs(batch: int, length: int, calls: int, backend: SDPBackend) -> list[Run]:
    """torch's attention, with keys and values in the layout it likes best."""

    def layer() -> Run:
        q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, KEY_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def run() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return run

    return [layer() for _ in range(calls)]


def measure_one(column: str, batch: int, length: int, calls: int) -> dict[str, float]:
    """Microseconds of a call by both ways of measuring."""
    if column in BACKENDS:
        layers = torchs(batch, length, calls, BACKENDS[column])
    else:
        layers = ours(batch, length, calls, 256 if column == PAGED else None)
    prepared = (lambda run: run) if column == CALLED else graphed
    return {
        DECODING: in_turn_microseconds(prepared(one_after_another(layers))) / calls,
        AFTER_WRITES: alone_microseconds(prepared(layers[0])),
    }


def measure(batch: int, length: int, rounds: int, copy: float) -> list[dict]:
    """One row for each implementation and way; "math" expands keys and values, so long caches are left out."""
    size, calls = bytes_of_cache(batch, length), calls_of(batch, length)
    found: dict[tuple[str, str], list[float]] = {}
    for _, column in itertools.product(range(rounds), COLUMNS):
        if column == "math" and batch * length > 2**18:
            continue
        for way, microseconds in measure_one(column, batch, length, calls).items():
            found.setdefault((way, column), []).append(microseconds)
        torch.cuda.empty_cache()
    rows = []
    for (way, column), times in found.items():
        microseconds = statistics.median(times)
        rows.append(
            {
                "measured": way,
                "implementation": column,
                "batch": batch,
                "length": length,
                "calls": calls if way == DECODING else 1,
                "microseconds": microseconds,
                "gigabytes_per_second": size / microseconds / 1e3,
                "share_of_copy": size / microseconds / 1e3 / copy,
            }
        )
    return rows


def table(rows: list[dict], machine: dict) -> str:
    """Markdown of all rows."""
    lines = [
        "# Decoding: one token against a cache",
        "",
        f"Microseconds of a call (share of copy bandwidth), {HEADS} query heads on {KEY_HEADS} key heads of {DIM}, "
        + "bfloat16; "
        + ", ".join(f"{name} {value}" for name, value in machine.items())
        + ".",
        "",
        "## As decoding runs",
        "",
        "Calls follow one another in one CUDA graph as a model's layers do, each with a cache of its own, "
        f"{CACHES >> 30} GiB together or more.",
        "",
        *table_of(rows, DECODING),
        "",
        "## After 256 MB of writes",
        "",
        "One call at a time by triton's do_bench. What the second-level cache holds of its writes goes to memory while "
        "the call reads.",
        "",
        *table_of(rows, AFTER_WRITES),
    ]
    return "\n".join([*lines, ""])


def table_of(rows: list[dict], way: str) -> list[str]:
    """Lines of one way of measuring."""
    rows = [row for row in rows if row["measured"] == way]
    lines = [
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
    return lines


SHAPES = [
    (64, 4, 3, 2), (64, 4, 4, 2), (64, 4, 6, 1), (128, 4, 3, 1), (128, 8, 3, 1),
]  # fmt: skip


def sweep(copy: float) -> None:
    """Share of copy bandwidth, as decoding runs, of block shapes (keys, warps, stages, resident programs) and parts."""
    for batch, length in ((1, 8192), (1, 65536), (16, 8192), (64, 8192)):
        size, calls = bytes_of_cache(batch, length), calls_of(batch, length)
        rules, layers = Rules(DIM**-0.5), []
        for _ in range(calls):
            q = torch.randn(batch, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(batch, length, KEY_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            layers.append((q, Cache(k, v, None, length)))
        for shape in SHAPES:
            sizes = LaunchSizes(*shape)
            slots = multiprocessors(q.device) * sizes.resident
            waves = {max(1, min(128, round(w * slots / (batch * KEY_HEADS)))) for w in (0.5, 1, 2, 4, 8)}
            found = {}
            for splits in sorted(waves):
                launch = functools.partial(
                    attend_cache.launch, rules=rules, rotary=None, appended=0, splits=splits, sizes=sizes, tile_rows=16
                )
                run = graphed(one_after_another([functools.partial(launch, *layer) for layer in layers]))
                found[splits] = f"{size * calls / in_turn_microseconds(run) / 1e3 / copy:.2f}"
            print(f"{batch} x {length}", shape, found, flush=True)


def commit_of_checkout() -> str:
    """Short hash, "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def chosen(names: list[str]) -> list[tuple[int, int]]:
    """The cases of names like "1" (all of a batch) and "16x8192"; all without names."""
    known = {case: {str(case[0]), "{}x{}".format(*case)} for case in CASES}
    unknown = set(names).difference(*known.values())
    if unknown:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: no such batch or case among {CASES}")
    return [case for case, called in known.items() if not names or called & set(names)]


def main() -> None:
    """Measure every case and write the tables, or sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("decode.json"), help="file for every figure")
    parser.add_argument("--rounds", type=int, default=2, help="how often the implementations take turns")
    parser.add_argument("--commit", default=commit_of_checkout(), help="recorded in the tables")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="batches (1) and cases (16x8192)")
    parser.add_argument("--sweep", action="store_true", help="print block shapes instead")
    arguments = parser.parse_args()
    cases = chosen(arguments.only)
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
        "command": " ".join(
            ["python docs/benchmarks/decode.py --rounds", str(arguments.rounds)]
            + (["--only", *arguments.only] if arguments.only else [])
        ),
    }
    rows = []
    for batch, length in cases:
        rows += measure(batch, length, arguments.rounds, copy)
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(table(rows, machine))


if __name__ == "__main__":
    main()
