"""Host time of attention calls over few tokens, beside torch's scaled_dot_product_attention.

    python docs/benchmarks/overhead.py                  # on a GPU, or on the CPU with nothing behind the launches
    python docs/benchmarks/overhead.py --profile        # and where the time of one forward and backward goes
    python docs/benchmarks/overhead.py --kernel triton  # without a GPU: the portable kernels, not Hopper's

Without a GPU, kernels are compiled for an H100 and launched on a driver that does nothing (tests/stand_in.py), so the
figures are Python's and torch's part: no kernel runs, and torch's own operators only where a CPU is to do the work, for
which no figure is given. On a GPU calls are issued without waiting for them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ringflash import flash_attn_func, functional
from ringflash.functional import attention
from ringflash.kernels.select import MODULES
from ringflash.parallel.execution.call import Inputs
from ringflash.parallel.mesh import ONE_DEVICE

HEADS, DIM = 8, 64
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def layers(device: str, tokens: int) -> dict[str, Layer]:
    """What is timed: functions of query, key and value (1, T, H, D)."""
    edges = torch.tensor([0, tokens // 3, tokens], device=device)
    found: dict[str, Layer] = {
        "ringflash.attention": lambda *x: attention(*x, group=ONE_DEVICE)[0],
        "ringflash.flash_attn_func": lambda *x: flash_attn_func(*x, causal=True),
        "the same, cu_seqlens on the device": lambda *x: attention(*x, cu_seqlens=edges, group=ONE_DEVICE)[0],
    }
    if device == "cuda":
        found["torch scaled_dot_product_attention"] = lambda *x: scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in x), is_causal=True
        ).transpose(1, 2)
    return found


def microseconds(call: Callable[[], object], calls: int = 20, rounds: int = 100) -> float:
    """Host time of a call: the least mean of `calls` in a row, so that what else the machine does hardly shows."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.thread_time  # on a GPU the backward pass has a thread of its own
    for _ in range(3):
        call()
    least = float("inf")
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        begin = clock()
        for _ in range(calls):
            call()
        least = min(least, clock() - begin)
    return least / calls * 1e6


def passes(layer: Layer, device: str, tokens: int) -> dict[str, Callable[[], object]]:
    """Forward alone, forward that prepares a backward pass, and that backward pass."""
    query, key, value = (
        torch.randn(1, tokens, HEADS, DIM, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
    )

    def without_gradients() -> None:
        with torch.no_grad():
            layer(query, key, value)

    out = layer(query, key, value)
    dout = torch.randn_like(out)
    return {
        "forward": without_gradients,
        "forward with gradients": lambda: layer(query, key, value),
        "backward": lambda: torch.autograd.grad(out, (query, key, value), dout, retain_graph=True),
    }


def main() -> None:
    """Print a table, and a profile if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print where the time of ringflash.attention goes")
    parser.add_argument("--kernel", choices=("hopper", "triton"), default="hopper", help="launched without a GPU")
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    tokens = arguments.tokens
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with nullcontext() if device == "cuda" else without_gpu(arguments.kernel):
        calls = {name: passes(layer, device, tokens) for name, layer in layers(device, tokens).items()}
        print(f"Host microseconds a call, {tokens} tokens, {HEADS} heads of {DIM}, causal, bfloat16, on {device}\n")
        print("| | " + " | ".join(next(iter(calls.values()))) + " |\n|---|---|---|---|")
        for name, row in calls.items():
            print(f"| {name} | " + " | ".join(f"{microseconds(call):.0f}" for call in row.values()) + " |")
        if arguments.profile:
            for name in ("forward with gradients", "backward"):
                show_profile(calls["ringflash.attention"][name])


def without_gpu(kernel: str) -> ExitStack:
    """Launches that do nothing, and boundaries on the CPU taken for boundaries on the device."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from stand_in import stand_in

    stack = ExitStack()
    driver = stack.enter_context(stand_in(import_module(MODULES[kernel])))
    driver.launches = deque(maxlen=1)  # so that no tensors are kept
    stack.enter_context(mock.patch.object(Inputs, "on_device", lambda inputs: inputs.boundaries is not None))
    stack.enter_context(mock.patch.object(functional, "on_a_device", lambda x: isinstance(x, Tensor)))
    return stack


def show_profile(call: Callable[[], object]) -> None:
    """Functions by the time spent in themselves; of one thread, which the backward pass has to run in as well."""
    with torch.autograd.set_multithreading_enabled(False), cProfile.Profile() as profile:
        for _ in range(500):
            call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
