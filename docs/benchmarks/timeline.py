"""A picture of what each GPU does during one layer's attention over several ranks, forward and backward.

    torchrun --nproc-per-node 4 docs/benchmarks/timeline.py --case causal --tokens 131072 --out runs/causal
    torchrun --nproc-per-node 4 docs/benchmarks/timeline.py --case documents --tokens 131072 --out runs/documents
    python docs/benchmarks/timeline.py --read runs/causal                    # the same from the traces, without GPUs

Cases are those of `suite=ring`, with its shapes. After a few calls that do not count, forward and backward are
profiled once on each rank by torch.profiler. Each begins when all ranks have met in a collective behind which the host
has queued what it can, as in training, where GPUs are behind their hosts. Written are `OUT-rank0.json.gz` and so on
(Chrome traces, for https://ui.perfetto.dev) and `OUT.png`; printed, for each rank, how long its SMs were busy, the
longest gaps with what stood before and after, and the host's time of the calls, which is measured without the
profiler.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from timeline_trace import LEAD, METADATA, PASSES, Pass, on_one_clock, read, table
from torch.profiler import ProfilerActivity, profile, record_function

from ringflash import Sharding
from ringflash.functional import attention
from ringflash.launch.benchmark_device import device_name
from ringflash.launch.benchmark_ring import CASES, DIM, HEADS, KEY_HEADS, Case
from ringflash.parallel.handles import placement_of

CALLS = 5
"""That warm up, and whose time on the host is taken."""
LEAD_CYCLES = 20_000_000
"""Of the GPU's clock, some 10 ms: longer than the host takes to queue a call under the profiler."""

Calls = dict[str, Callable[[], object]]


# On the GPUs


def calls_of(sharding: Sharding, device: torch.device) -> Calls:
    """Forward, and the backward pass of the forward before it."""
    query, key, value, dout = (
        torch.randn(1, sharding.tokens, heads, DIM, device=device, dtype=torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out: list[torch.Tensor] = []

    def forward() -> None:
        out[:] = [attention(*leaves, sharding=sharding)[0]]

    return {"forward": forward, "backward": lambda: torch.autograd.grad(out[0], leaves, dout)}


def lead(device: torch.device) -> None:
    """Keep the GPU busy for longer than the host takes, and let ranks meet behind that; the host waits for nothing."""
    torch.cuda._sleep(LEAD_CYCLES)
    dist.all_reduce(torch.empty(1, device=device))


def hosts_time(calls: Calls, device: torch.device) -> dict[str, float]:
    """Median microseconds of each call on this rank's host, which waits for nothing."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            lead(device)
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e6)
            torch.cuda.synchronize()
    return {name: statistics.median(each) for name, each in times.items()}


def profiled(calls: Calls, device: torch.device, notes: dict[str, Any], path: Path) -> None:
    """Write the trace of one of each."""
    for last in (False, True):  # the first time, the profiler itself is made ready
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for name, call in calls.items():
                with record_function(LEAD + name):
                    lead(device)
                with record_function(name):
                    call()
                torch.cuda.synchronize()
        if last:
            profiler.export_chrome_trace(str(path))
            trace = json.loads(gzip.decompress(path.read_bytes()))
            trace[METADATA] = notes  # `add_metadata_json` would turn backslashes into slashes
            path.write_bytes(gzip.compress(json.dumps(trace).encode()))


def stages_of(sharding: Sharding, device: torch.device) -> dict[str, list[int]]:
    """The stage of each launch of this rank, in the order of launches."""
    placement, index = placement_of(sharding.handle())
    program = placement.program(index, device)
    pieces = {"forward": [(x,) for x in program.stages], "backward": program.backward_stages}
    return {
        name: [stage for stage, each in enumerate(found) for piece in each for _ in piece.launches]
        for name, found in pieces.items()
    }


def run(options: argparse.Namespace) -> None:
    """Profile on all ranks; the first shows what they wrote."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    case = case_of(options.case, options.tokens)
    partition = options.partition or case.partitions[0]
    sharding = case.sharding(
        case.documents(case.tokens, seed=0), partition=partition, plan=options.plan, head_ranks=options.head_ranks
    )
    calls = calls_of(sharding, device)
    hosts_time(calls, device)  # compiles and allocates
    notes = {
        "title": f"{case.name}, {case.tokens:,} tokens, {partition}, {dist.get_world_size()} x {device_name()}",
        "sharding": sharding.describe(),
        "host": hosts_time(calls, device),
        "stages": stages_of(sharding, device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    profiled(calls, device, notes, trace_path(options.out, dist.get_rank()))
    dist.barrier()
    if dist.get_rank() == 0:
        show(options.out)
    dist.destroy_process_group()


def case_of(name: str, tokens: int) -> Case:
    """Of `suite=ring`, by the beginning of its name."""
    found = [case for case in CASES if case.name.startswith(name) and case.tokens == tokens]
    if not found:
        known = ", ".join(f"{case.name} of {case.tokens}" for case in CASES)
        raise SystemExit(f"--case {name!r} --tokens {tokens}: allowed are {known}")
    return found[0]


# From the traces


def trace_path(out: Path, rank: int) -> Path:
    """Where a rank's trace lies."""
    return out.with_name(f"{out.name}-rank{rank}.json.gz")


def show(out: Path) -> None:
    """Draw what the ranks' traces say, and print the table."""
    traces = []
    while (path := trace_path(out, len(traces))).exists():
        traces.append(json.loads(gzip.decompress(path.read_bytes())))
    if not traces:
        raise SystemExit(f"{path} is not there")
    notes = [trace[METADATA] for trace in traces]
    ranks, apart = on_one_clock([read(trace) for trace in traces])
    picture = out.with_name(f"{out.name}.png")
    draw(picture, notes[0]["title"], ranks)
    print(f"{notes[0]['title']}\n{notes[0]['sharding']}\ndrawn in {picture}")
    print("ranks' clocks begin within " + ", ".join(f"{x:.0f} us ({name})" for name, x in apart.items()))
    print(f"\n{table(ranks, [each['host'] for each in notes])}", flush=True)


LANES = {
    "attention": 0,
    "other kernel": 0,
    "copy": 1,
    "nccl": 1,
    "own copy": 2,
}
"""Of a rank's three, from above, by kinds; flags are too short to be seen."""
COLOURS = {"other kernel": "black", "copy": "#d62728", "nccl": "#9467bd", "own copy": "#bbbbbb"}
STAGES = ("#1f77b4", "#2ca02c", "#17becf", "#bcbd22", "#8c6d31", "#e377c2", "#7f7f7f", "#ff7f0e")


def draw(path: Path, title: str, ranks: list[dict[str, Pass]]) -> None:
    """A panel for each call; three lanes for each rank: kernels, copies between GPUs, copies within one."""
    figure = Figure(figsize=(14, 2 * (0.9 + 0.55 * len(ranks)) + 0.6), layout="constrained")
    for panel, name in zip(figure.subplots(len(PASSES), 1), PASSES, strict=True):
        for rank, each in enumerate(ranks):
            _draw_rank(panel, each[name], 4 * rank)
        panel.set_yticks([4 * rank + 1 for rank in range(len(ranks))], [f"rank {rank}" for rank in range(len(ranks))])
        panel.set_ylim(4 * len(ranks) - 0.7, -0.9)
        end = max(each[name].end for each in ranks)
        panel.set_xlim(-0.01 * end / 1e3, 1.01 * end / 1e3)
        panel.set_xlabel(f"{name}, ms")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    patches = [Patch(color=STAGES[0], label="attention; colours and numbers are stages")]
    drawn = {x.kind for each in ranks for found in each.values() for x in found.events}
    patches += [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in drawn]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def _draw_rank(panel: Axes, found: Pass, top: int) -> None:
    for kind, lane in LANES.items():
        events = [x for x in found.events if x.kind == kind]
        spans = [(x.begin / 1e3, (x.end - x.begin) / 1e3) for x in events]
        colours = [COLOURS.get(kind, STAGES[(x.stage or 0) % len(STAGES)]) for x in events]
        panel.broken_barh(spans, (top + lane - 0.45, 0.9), facecolors=colours, edgecolors="white", linewidth=0.2)
    for x in found.events:
        if x.stage is not None and x.end - x.begin > 0.01 * found.end:
            middle = (x.begin + x.end) / 2e3
            panel.text(middle, top, str(x.stage), color="white", fontsize=7, ha="center", va="center", clip_on=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="causal", help="causal, documents or window: how a case's name begins")
    parser.add_argument("--tokens", type=int, default=131072, help="of the sequence")
    parser.add_argument("--partition", help="the case's first if not said")
    parser.add_argument("--plan", help="by name; chosen if not said")
    parser.add_argument("--head-ranks", type=int, default=1, help="that exchange heads for tokens")
    parser.add_argument("--out", type=Path, help="where traces and picture go, without a suffix")
    parser.add_argument("--read", type=Path, help="an earlier --out: show its traces again")
    options = parser.parse_args()
    if (options.out is None) == (options.read is None):
        parser.error("give either --out, under torchrun, or --read")
    if options.read is not None:
        show(options.read)
    elif not torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        parser.error("--out needs GPUs and torchrun")
    else:
        run(options)


if __name__ == "__main__":
    main()
