"""Prints and draws the plan by which keys travel between ranks, and how long it takes, predicted and measured.

    python launch/plan.py                                             # text: causal, 4,096 tokens, zigzag over 4 ranks
    python launch/plan.py --ranks 8 --window 511 --partition contiguous --svg window.svg
    python launch/plan.py --documents 0,700,1500,4096 --svg documents.svg
    python launch/plan.py ranks=64 hosts=8 length=1048576 plan=all    # all plans beside each other, on hosts to come
    python launch/plan.py simulate=true picture=hosts.png             # 8, 64 and 512 GPUs in hosts of 8
    torchrun --nproc-per-node 4 launch/plan.py length=131072 measure=true picture=times.png
    torchrun --nproc-per-node 4 launch/plan.py calibrate=true         # measures this machine, for all predictions

Every option is also taken as key=value. What is predicted is so for the machine that was measured, or for H100s; each
stage takes a rank its launch, and then it waits for what has to come or leave.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ringflash.errors import ArgumentError
from ringflash.launch.calibrate import calibrate, keep
from ringflash.launch.flags import as_flags
from ringflash.launch.plan_hosts import RANKS as SIMULATED
from ringflash.launch.plan_hosts import as_table, simulate
from ringflash.launch.plan_hosts import draw as draw_hosts
from ringflash.launch.plan_picture import as_svg, stage_count, stage_of, visible_ranges
from ringflash.launch.plan_times import as_text as times_as_text
from ringflash.launch.plan_times import draw as draw_times
from ringflash.launch.plan_times import measure, predicted
from ringflash.parallel.planning.choose import choose
from ringflash.parallel.planning.choose_heads import by_heads
from ringflash.parallel.planning.cost import Prediction, Shape, predict
from ringflash.parallel.planning.generators import NAMES, check_plan, in_words, plan_named
from ringflash.parallel.planning.heads import rows_in_groups
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.planning.machine import COPY_ENGINE, SEND_RECV, Machine, cache_path, machine_for
from ringflash.parallel.planning.plan import Plan
from ringflash.parallel.planning.verify import verify
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import NAMES as PARTITIONS
from ringflash.parallel.positions.partition import Partition, default_partition, resolve
from ringflash.parallel.positions.segments import Segments
from ringflash.parallel.positions.visibility import needed_keys
from ringflash.parallel.sharding import Sharding

HEADS = "heads"
"""Beside the names of plans."""

MACHINES = {"h100": SEND_RECV, "h100-copy-engine": COPY_ENGINE}


def pairs(plan: Plan, mask: Mask, index: int, rank: int) -> int:
    """Number of (query, key) pairs that a rank computes in a stage."""
    ranges = visible_ranges(mask, plan.queries.positions(rank))
    return sum(
        int((stop.clamp(max=last) - start.clamp(min=first)).clamp(min=0).sum())
        for start, stop in ranges
        for first, last in stage_of(plan, index, rank).work
    )


# Text


def as_text(plan: Plan, mask: Mask, title: str) -> str:
    """The plan in words and numbers, a line for each rank of each stage."""
    ranks = plan.queries.ranks
    lines = [title, "", "who holds what"]
    lines += [f"  rank {rank}: {_spans(segments)}" for rank, segments in enumerate(plan.queries.segments)]
    totals = [0] * ranks
    for index in range(stage_count(plan)):
        lines += ["", f"stage {index}"]
        for rank in range(ranks):
            stage, computed = stage_of(plan, index, rank), pairs(plan, mask, index, rank)
            totals[rank] += computed
            sends = [f"sends {_spans(move.segments)} to rank {move.peer}" for move in stage.sends]
            attends = f"attends {_spans(stage.work)}: {computed:,} pairs" if stage.work else "attends nothing"
            lines.append(f"  rank {rank}: " + "; ".join([attends, *sends]))
    level = max(totals) * ranks / sum(totals) if sum(totals) else 1.0
    moved = sum(mine.moved_tokens for mine in plan.ranks)
    lines += ["", f"{moved:,} keys travel; the busiest rank computes {level:.2f} times the mean"]
    return "\n".join(lines)


def _spans(segments: Segments) -> str:
    return " ".join(f"[{start}, {stop})" for start, stop in segments) or "nothing"


def compared(costs: dict[str, Prediction], machine: Machine, shape: Shape) -> str:
    """What all plans, and heads in place of one, are predicted to cost, a line each."""
    heads = f"{shape.heads} query and {shape.key_heads} key heads of {shape.head_dim}"
    lines = [f"predicted for {heads} on {machine.name}", ""]
    for name, cost in sorted(costs.items(), key=lambda x: x[1].total):
        lines.append(
            f"  {name}: {cost.total * 1e3:.3f} ms, of it forward {cost.forward.total * 1e3:.3f}; "
            f"{cost.memory / 2**20:,.1f} MiB beside a rank's own keys; {cost.moved:,} keys travel; "
            + ("all ranks exchange heads for tokens" if name == HEADS else in_words(name))
        )
    return "\n".join(lines)


# Command line


def mask_of(options: argparse.Namespace) -> tuple[Mask, str]:
    """The mask that the command line describes, and its name."""
    mask, names = (Mask.bidirectional(), ["bidirectional"]) if options.bidirectional else (Mask.causal(), ["causal"])
    if options.window is not None:
        right = None if options.bidirectional else 0
        mask &= Mask.sliding_window(options.window, right, sink=options.sink)
        names.append(f"window of {options.window} back" + (f", {options.sink} sinks" if options.sink else ""))
    elif options.sink:
        raise ArgumentError(f"--sink {options.sink} needs --window: without one nothing hides the first tokens")
    if options.chunk is not None:
        mask &= Mask.chunked(options.chunk)
        names.append(f"chunks of {options.chunk}")
    if options.documents is not None:
        mask &= Mask.documents(options.documents)
        names.append(f"{len(options.documents) - 1} documents")
    return mask, ", ".join(names)


def machine_of(name: str | None, ranks: int, hosts: int) -> Machine:
    """The machine that the command line names: one of `MACHINES`, a measurement's file, or what is known here."""
    if name in MACHINES:
        return MACHINES[name]
    if name is not None and not Path(name).exists():
        raise ArgumentError(f"--machine {name}; allowed are {', '.join(MACHINES)} and the file of a measurement")
    return machine_for(ranks, hosts, None if name is None else Path(name))


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="number of ranks (4, or as many as torchrun started)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the whole sequence (4096)")
    parser.add_argument("--partition", choices=PARTITIONS, help="zigzag, but balanced for documents, if not said")
    parser.add_argument(
        "--token-work", type=int, default=0, help="what the rest of a layer costs a token, in pairs (0)"
    )
    parser.add_argument("--bidirectional", action="store_true", help="every query sees every key; default is causal")
    parser.add_argument("--window", type=int, help="tokens before the query that it sees")
    parser.add_argument("--sink", type=int, default=0, help="first tokens that stay visible behind the window")
    parser.add_argument("--chunk", type=int, help="a query sees its own chunk of this many tokens only")
    parser.add_argument("--documents", type=_numbers, help="boundaries, for example 0,700,4096")
    parser.add_argument("--plan", help=f"{', '.join(NAMES)}; chosen if not said; all: compare them")
    parser.add_argument("--hosts", type=int, default=1, help="hosts that the ranks lie on, equally many on each (1)")
    parser.add_argument(
        "--heads", type=_numbers, default=[32, 8, 128], help="query heads, key heads, dimension (32,8,128)"
    )
    parser.add_argument(
        "--machine", help=f"{', '.join(MACHINES)}, or a measurement's file; what was measured if not said"
    )
    parser.add_argument("--times", action="store_true", help="print what every rank and stage takes, predicted")
    parser.add_argument("--measure", action="store_true", help="the same measured, under torchrun")
    parser.add_argument("--simulate", action="store_true", help="efficiency on 8, 64 and 512 GPUs in hosts of 8")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine and keep it for predictions")
    parser.add_argument("--svg", type=Path, help="file to draw the plan into")
    parser.add_argument("--picture", type=Path, help="file to draw times into, of each rank and stage or simulated")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan that the command line describes, and draw it if asked to."""
    parser = _parser()
    options = parser.parse_args(as_flags(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.calibrate or options.measure:
            _with_group(options)
        else:
            _without_group(options)
    except ArgumentError as error:
        parser.error(str(error))


def _without_group(options: argparse.Namespace) -> None:
    shape = _shape(options)
    if options.simulate:
        machine = machine_of(options.machine, ranks=max(SIMULATED), hosts=2)
        shares = simulate(machine, shape)
        print(f"Share of one GPU's speed at equal work, predicted for {machine.name}\n\n{as_table(shares)}")
        if options.picture:
            draw_hosts(options.picture, shares, machine)
            print(f"drawn into {options.picture}")
        return
    options.ranks = 4 if options.ranks is None else options.ranks
    machine = machine_of(options.machine, options.ranks, options.hosts)
    mask, partition, title = _problem(options)
    found = loads(mask, partition, partition, needed_keys(mask, partition.segments, partition.length))
    if options.plan == "all":
        plans = {name: plan_named(name, mask, partition, hosts=options.hosts) for name in NAMES}
        costs = {
            name: predict(plan.outline, found, machine, shape, options.hosts, options.token_work)
            for name, plan in plans.items()
        }
        choice = choose(mask, partition, None, options.hosts, machine, shape, token_work=options.token_work)
        if choice.predicted and options.hosts == 1:
            rows = rows_in_groups(max(partition.counts()), int(found.pairs.sum()) / options.length)
            costs[HEADS] = by_heads(choice, np.array(partition.counts()), rows)
        print(f"{title}\n\n{compared(costs, machine, shape)}")
        return
    plan, because = _plan(options, mask, partition, machine, shape)
    verify(plan, mask)
    print(as_text(plan, mask, title))
    print(f"\n{because}")
    if options.times or options.picture:
        cost = predict(plan.outline, found, machine, shape, options.hosts, options.token_work)
        print(f"\n{times_as_text(predicted(cost))}")
        if options.picture:
            draw_times(options.picture, f"{title}, {plan.name}", predicted(cost))
            print(f"drawn into {options.picture}")
    if options.svg:
        options.svg.write_text(as_svg(plan, mask, title), encoding="utf-8")
        print(f"drawn into {options.svg}")


def _with_group(options: argparse.Namespace) -> None:
    """What is measured, by all processes that torchrun started."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        _calibrate(options, device) if options.calibrate else _measure(options, device)
    finally:
        if started:
            dist.destroy_process_group()


def _calibrate(options: argparse.Namespace, device: torch.device) -> None:
    path = Path(options.machine) if options.machine else cache_path()
    machine = calibrate(device)
    keep(machine, path)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{machine.text()}\nkept in {path}")


def _measure(options: argparse.Namespace, device: torch.device) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1 or options.ranks not in (None, ranks):
        raise ArgumentError(
            f"--measure with --ranks {options.ranks} in {ranks} processes; start as many by torchrun, and more than one"
        )
    options.ranks = ranks
    machine, shape = machine_of(options.machine, ranks, options.hosts), _shape(options)
    mask, partition, title = _problem(options)
    plan, because = _plan(options, mask, partition, machine, shape)
    found = loads(mask, partition, partition, needed_keys(mask, partition.segments, partition.length))
    cost = predict(plan.outline, found, machine, shape, options.hosts)
    sharding = Sharding(mask, seqlen=options.length, partition=partition, plan=plan.name, hosts=options.hosts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    measured = measure(sharding, shape, device, dtype)
    if dist.get_rank():
        return
    print(f"{title}\n{because}\n\n{times_as_text(predicted(cost), measured)}")
    if options.picture:
        draw_times(options.picture, f"{title}, {plan.name}", predicted(cost), measured)
        print(f"drawn into {options.picture}")


def _shape(options: argparse.Namespace) -> Shape:
    if len(options.heads) != 3 or min(options.heads) < 1 or options.heads[0] % options.heads[1]:
        raise ArgumentError(
            f"--heads {','.join(map(str, options.heads))}; allowed are query heads, key heads that divide them, and "
            "their dimension"
        )
    return Shape(*options.heads)


def _problem(options: argparse.Namespace) -> tuple[Mask, Partition, str]:
    """The mask, the partition and what to call them."""
    mask, name = mask_of(options)
    if options.length < 1 or options.ranks < 1:
        raise ArgumentError(f"--length {options.length}, --ranks {options.ranks}; both are at least 1")
    if mask.boundaries and mask.boundaries[-1] != options.length:
        raise ArgumentError(f"--documents ends at {mask.boundaries[-1]}, --length is {options.length}")
    kind = options.partition or default_partition(mask, options.length)
    partition = resolve(kind, options.length, options.ranks, mask, token_work=options.token_work)
    return mask, partition, f"{name}: {options.length:,} tokens, {kind} over {options.ranks} ranks"


def _plan(
    options: argparse.Namespace, mask: Mask, partition: Partition, machine: Machine, shape: Shape
) -> tuple[Plan, str]:
    """The plan that was named or is chosen, and why."""
    if options.plan is None:
        choice = choose(
            mask, partition, hosts=options.hosts, machine=machine, shape=shape, token_work=options.token_work
        )
        name, because = choice.name, choice.describe()
    else:
        check_plan(options.plan)
        name, because = options.plan, f"{options.plan}: {in_words(options.plan)}; as it was named"
    return plan_named(name, mask, partition, hosts=options.hosts), because


if __name__ == "__main__":
    main()
