"""Host time of attention over several ranks.

    python docs/benchmarks/overhead_ring.py                         # one process: ringflash's own part
    torchrun --nproc-per-node=2 docs/benchmarks/overhead_ring.py    # all of it, over the ranks there are

Alone, a rank of P walks its program with transports, rounds and kernels that do nothing, so figures are Python's and
torch's part; for a stage, what is beyond one device's call. Under torchrun calls are whole, over few tokens, and issued
without waiting for them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.parallel.execution import call
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.placement import Placement
from ringflash.parallel.transport.send_recv import Delivery, Ticket


def microseconds(
    function: Callable[[], object], clock: Callable[[], float], calls: int = 20, rounds: int = 30
) -> float:
    """Of a call: the least mean of `calls` in a row."""
    for _ in range(3):
        function()
    least = float("inf")
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = clock()
        for _ in range(calls):
            function()
        least = min(least, clock() - begin)
    return least / calls * 1e6


def passes(attend: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> tuple[Callable, Callable]:
    """Forward with gradients, and backward."""
    out, _ = attend(*leaves)
    dout = torch.randn_like(out)
    return lambda: attend(*leaves), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


class NoTransport:
    """Says that everything has arrived; like copy engines, lets ranks take keys from their owners."""

    def open(self, device: torch.device, nbytes: int | None) -> None:
        """Nothing is to be chosen."""

    @property
    def shelf(self) -> NoTransport:
        return self

    def publish(self, rows: object, given: object) -> None:
        """Nobody takes any."""

    def mark(self) -> str:
        return "now"

    def pull(self, pulls: tuple, targets: object, what: str, free: object, last: bool) -> Ticket:
        return Ticket([], [], what)

    def release(self) -> None:
        """Nobody waits for that."""

    def transfer(self, sends: list, receives: list, what: str) -> Ticket:
        return Ticket([], [], what)

    def copy_engines(self, device: torch.device) -> None:
        """Every call finds its own way."""
        return None

    def needs_room(self, device: torch.device) -> bool:
        return False

    def deliver(self, parts: list, expected: list, room: object, what: str) -> Delivery:
        return Delivery(Ticket([], [], what), [], 1, 1)


def no_kernels(leaves: list[Tensor]) -> SimpleNamespace:
    """Kernels that hand back what was made before."""
    query = leaves[0].detach()[0].clone()
    rows = torch.zeros(query.shape[1], query.shape[0])
    return SimpleNamespace(
        attend=lambda *_, carry, **__: carry or (query, rows),
        attend_backward=lambda dout, q, k, v, *_, **__: (query, torch.empty_like(k), torch.empty_like(v)),
        row_delta=lambda *_: rows,
        add_rows=lambda *_: None,
    )


def alone() -> None:
    """A table of ringflash's own part."""
    print("| ranks | tokens, documents | stages | forward, us | a stage | backward, us | a stage |")
    print("|---|---|---|---|---|---|---|")
    one = _alone(1, 64, 1)
    print(f"| 1 | 64, 1 | 1 | {one[1]:.0f} | | {one[2]:.0f} | |")
    for ranks, tokens, documents in ((4, 64, 1), (8, 64, 1), (64, 64, 1), (8, 8000, 1000), (8, 40000, 10000)):
        stages, *us = _alone(ranks, tokens, documents)
        forward, backward = (x - y for x, y in zip(us, one[1:], strict=True))
        print(
            f"| {ranks} | {tokens}, {documents} | {stages} | {us[0]:.0f} | {forward / stages:.1f} | {us[1]:.0f} | "
            f"{backward / stages:.1f} |"
        )


def _alone(ranks: int, tokens: int, documents: int) -> tuple[int, float, float]:
    """Stages, and microseconds of both passes of one rank of `ranks`, each with `tokens`."""
    length = ranks * tokens
    edges = torch.arange(documents + 1) * length // documents
    group = SimpleNamespace(size=lambda: ranks, rank=lambda: ranks // 2)
    nothing = SimpleNamespace(check=lambda *_: None, close=lambda *_: None)
    sharding = Sharding(cu_seqlens=edges, rank=ranks // 2, ranks=ranks)
    sharding._placement.group = group if ranks > 1 else None
    leaves = [torch.randn(1, sharding.tokens, 1, 8, requires_grad=True) for _ in range(3)]
    with (
        mock.patch.object(call, "agreement", return_value=nothing),
        mock.patch.object(Placement, "transport", NoTransport()),
        mock.patch.object(call, "select", return_value=no_kernels(leaves)),
        mock.patch.object(Placement, "bind"),
    ):
        times = [
            microseconds(function, time.thread_time, calls=10, rounds=20)
            for function in passes(lambda *x: attention(*x, sharding=sharding), leaves)
        ]
    stages = 1 if ranks == 1 else len(sharding._placement.plan(0).stages)
    return stages, *times


def together(tokens: int) -> None:
    """Whole calls over the ranks of torchrun."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    leaves = [torch.randn(1, tokens, 8, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)]
    edges = torch.arange(1001) * (tokens * ranks) // 1000
    sharding = Sharding(Mask.causal(), cu_seqlens=edges, partition="zigzag")
    ways = {
        "one device": lambda *x: attention(*x, group=ONE_DEVICE),
        f"{ranks} ranks": lambda *x: attention(*x),
        f"{ranks} ranks, 1,000 documents by a sharding": lambda *x: attention(*x, sharding=sharding),
        f"{ranks} ranks, 1,000 documents by cu_seqlens": lambda *x: attention(*x, cu_seqlens=edges, partition="zigzag"),
    }
    if rank == 0:
        print(f"Host microseconds a call, {tokens} tokens a rank, on {device}, torch {torch.__version__}\n")
        print("| | forward with gradients | backward |\n|---|---|---|")
    for name, attend in ways.items():
        us = [microseconds(x, time.perf_counter, calls=10) for x in passes(attend, leaves)]
        if rank == 0:
            print(f"| {name} | {us[0]:.0f} | {us[1]:.0f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank, under torchrun")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        together(arguments.tokens)
    else:
        alone()


if __name__ == "__main__":
    main()
