"""Measures a machine for the cost model of plans.

Of several processes, as torchrun starts them, all measure and the slowest counts: every rank and every host then keeps
the same figures. One process alone measures kernels only, and keeps an H100's links.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.functional import attention
from ringflash.launch.benchmark_device import device_name
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.planning.cost import Shape
from ringflash.parallel.planning.machine import MIB, SEND_RECV, Link, Machine
from ringflash.parallel.planning.pulls import Pull
from ringflash.parallel.transport.base import Ticket
from ringflash.parallel.transport.select import transport_of

REPEATS = 10

IN_A_ROW = 8
"""Calls that take the host less time, all together, than the work that they wait behind takes a GPU."""


def calibrate(device: torch.device) -> Machine:
    """What the cost model knows of this machine; every rank of the default group, if there is one, calls this.

    Args:
        device: of this rank.
    """
    on_gpu = device.type == "cuda"
    shape = Shape() if on_gpu else Shape(heads=4, key_heads=2, head_dim=64, element=4)
    tokens = 16384 if on_gpu else 1024
    forward, both = _attention(tokens, shape, device)
    operations = tokens**2 / 2 * 4 * shape.heads * shape.head_dim
    found = {
        "forward": operations / forward,
        "backward": 2.5 * operations / max(both - forward, both / 10),
        "memory": _memory(device),
        "launch": _launch(shape, device),
    }
    slowest = {name: _of_all(value, min if name != "launch" else max) for name, value in found.items()}
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    inside, outside = _links(device, shape, tokens)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    machine = Machine(
        name=f"{ranks} x {device_name()}, measured",
        processors=processors,
        inside=inside,
        outside=outside,
        **slowest,
    )
    if dist.is_initialized():
        agreed = [machine]
        dist.broadcast_object_list(agreed, src=0)
        machine = agreed[0]
    return machine


def _of_all(value: float, which: Callable[[Sequence[float]], float]) -> float:
    if not dist.is_initialized():
        return value
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return which(values)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a call, done on the device; all ranks begin together."""

    def once() -> float:
        begun = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - begun

    return _median(once, device)


def _seconds_behind_work(call: Callable[[], object], work: Callable[[], object], device: torch.device) -> float:
    """Median of one of `IN_A_ROW` calls; on a GPU asked for behind work, so that the host's own time is not in it."""
    if device.type != "cuda":
        return _seconds(call, device)

    def once() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        start.record()
        for _ in range(IN_A_ROW):
            call()
        stop.record()
        _wait(device)
        return start.elapsed_time(stop) / 1e3 / IN_A_ROW

    return _median(once, device)


def _median(timed: Callable[[], float], device: torch.device) -> float:
    times = []
    for repeat in range(REPEATS + 2):
        if dist.is_initialized():
            dist.barrier()
        _wait(device)
        seconds = timed()
        if repeat >= 2:  # the first compile and allocate
            times.append(seconds)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attention(tokens: int, shape: Shape, device: torch.device) -> tuple[float, float]:
    """Seconds of causal attention on one device, forward, and with its backward pass."""
    forward, both = _calls(tokens, shape, device)
    return _seconds(forward, device), _seconds(both, device)


def _calls(tokens: int, shape: Shape, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, tokens, heads, shape.head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    dout = torch.randn_like(query)

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(query, key, value, group=ONE_DEVICE)[0]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(query, key, value, group=ONE_DEVICE)[0], (query, key, value), dout)

    return forward, both


def _launch(shape: Shape, device: torch.device) -> float:
    """Seconds of a launch with next to no work, where the host is far ahead of the device."""
    little, _ = _calls(128, shape, device)
    if device.type == "cpu":
        return _seconds(little, device)
    much, _ = _calls(65536, shape, device)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    little()
    much()
    start.record()
    for _ in range(REPEATS):
        little()
    stop.record()
    _wait(device)
    return start.elapsed_time(stop) / 1e3 / REPEATS


def _memory(device: torch.device) -> float:
    """Bytes a second that are read and written."""
    x = torch.empty((256 if device.type == "cuda" else 16) * MIB, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / _seconds(lambda: y.copy_(x), device)


# Links


def _links(device: torch.device, shape: Shape, tokens: int) -> tuple[Link, Link]:
    """Within hosts and between them; an H100's where there is none to measure."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return SEND_RECV.inside, SEND_RECV.outside
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    rank, mine = dist.get_rank(), [other for other, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
    place = mine.index(rank)
    inside, outside = SEND_RECV.inside, SEND_RECV.outside
    if all(hosts.count(host) > 1 for host in hosts):
        after, before = mine[(place + 1) % len(mine)], mine[place - 1]
        inside = _link(after, before, device, shape, tokens)
    if len(set(hosts)) > 1:
        size = len(mine)
        after, before = (rank + size) % len(hosts), (rank - size) % len(hosts)
        outside = _link(after, before, device, shape, tokens)
    return inside, outside


def _link(after: int, before: int, device: torch.device, shape: Shape, tokens: int) -> Link:
    """Every rank sends to one and receives from another at once, as in a ring."""
    assert dist.group.WORLD is not None  # links are measured where there is a group
    transport = transport_of(dist.group.WORLD)
    sizes = [x * MIB for x in ((1, 4, 16, 64, 256) if device.type == "cuda" else (1, 4))]
    transport.open(device, sizes[-1])
    sent = torch.zeros(sizes[-1], dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def asked(size: int) -> Ticket:
        """As keys come in a call: taken from their owner, or sent."""
        what, shelf = "a measurement", transport.shelf
        if shelf is None:
            return transport.transfer([(after, sent[:size])], [(before, received[:size])], what)
        shelf.publish([sent[:size]], ((0, size),))
        pulls = (Pull(before, size, ((0, 0, size),)),)
        return shelf.pull(pulls, [received[:size]], what, shelf.mark(), last=True)

    def move(size: int) -> None:
        asked(size).wait()

    compute = _calls(tokens, shape, device)[0]

    def of_size(size: int) -> float:
        return _of_all(_seconds_behind_work(lambda: move(size), compute, device), max)

    seconds = [of_size(size) for size in [1, *sizes]]
    for index in range(1, len(seconds)):  # noise must not make more take less
        seconds[index] = max(seconds[index], seconds[index - 1])

    def beside() -> None:
        ticket = asked(sizes[-1])
        compute()
        ticket.wait()

    alone, together = (_seconds_behind_work(call, compute, device) for call in (compute, beside))
    hidden = (alone + seconds[-1] - together) / min(alone, seconds[-1])
    share = _of_all(min(1.0, max(0.0, hidden)), min)
    return Link((1.0, *map(float, sizes)), tuple(seconds), share, ahead=transport.shelf is not None)


def keep(machine: Machine, path: Path) -> None:
    """Write the measurement, whole or not at all; every rank does, for each host needs it and all have the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(machine.text())
    unfinished.replace(path)
