"""Small problems of every kernel, for a memory checker to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py hopper64 hopper128

Lengths end within tiles, and every tensor is an allocation of its own, so that a read behind its end is seen. The tests
hold results against float64; here they are looked at only for what is no number.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from oracle import (
    Problem,
    dense_intervals,
    draw_modifiers,
    draw_problem,
    monotone_intervals,
    run,
    to_device,
    with_blocks,
)

from ringflash import flash_attn_with_kvcache
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.select import select
from ringflash.kernels.whole_backward import whole_backward

HEADS = (4, 2)


def intervals() -> dict[str, KeyIntervals]:
    """Masks by name."""
    found = {
        "causal": causal_intervals(197, 261),
        "full": dense_intervals(131, 67),
        "any": monotone_intervals(301, 203, seed=1, sink=False),
        "one row": dense_intervals(1, 1),
    }
    return {name: to_device(x, "cuda") for name, x in found.items()}


def check(name: str, problem: Problem, cuts: tuple[int, ...] = (), deterministic: bool = False) -> None:
    """Forward and backward."""
    dims = problem.query.shape[2], problem.value.shape[2]
    kernels = select("cuda", problem.query.dtype, *dims, name)
    results = run(kernels, problem, cuts, deterministic=deterministic)
    for result, x in vars(results).items():
        assert not x.isnan().any(), result


def check_kernels(name: str, dim: int) -> None:
    """Every mask, in one launch and in two."""
    for mask, x in intervals().items():
        problem = draw_problem(x, HEADS, (dim, dim), torch.bfloat16)
        check(name, problem)
        check(name, problem, cuts=(x.key_count // 2,), deterministic=True)
        print(f"{name} {dim} {mask}", flush=True)


def check_modifiers(name: str, dim: int) -> None:
    """All score modifiers and sink tokens at once."""
    x = to_device(monotone_intervals(205, 140, seed=2, sink=True), "cuda")
    modifiers = draw_modifiers(x, HEADS[0], 3, 3.0, "of each row", 0.3, True)
    check(name, draw_problem(x, HEADS, (dim, dim), torch.float16, modifiers=modifiers))
    print(f"{name} {dim} modifiers", flush=True)


def check_chunks() -> None:
    """Sink tokens that so many rows see that the Hopper kernels cut them into chunks."""
    row = torch.arange(2301, device="cuda")
    start = (row - 100).clamp(min=0)
    intervals = KeyIntervals(start, row + 1, len(row), torch.zeros_like(row), start.clamp(max=4))
    for dim in (64, 128, 256):
        check("hopper", draw_problem(intervals, HEADS, (dim, dim), torch.bfloat16))
        print(f"hopper {dim} chunks", flush=True)


def check_blocks(name: str, dim: int) -> None:
    """Listed blocks, whole ones of the kernels' and parts of them."""
    for sizes, first in (((128, 128), (0, 0)), ((50, 24), (7, 3))):
        x = to_device(with_blocks(causal_intervals(397, 461), 2, sizes, 0, first), "cuda")
        problem = draw_problem(x, HEADS, (dim, dim), torch.bfloat16)
        check(name, problem)
        check(name, problem, cuts=(200,))
        print(f"{name} {dim} blocks of {sizes}", flush=True)


def check_narrow() -> None:
    """Rows that see few keys, of which the host knows; tiles and passes of every kind."""
    row = torch.arange(301, device="cuda")
    for dim, heads, window in ((64, (16, 2), 128), (64, (4, 2), 30), (128, (3, 3), 128), (128, (8, 1), 40)):
        intervals = KeyIntervals((row + 1 - window).clamp(min=0), row + 1, len(row), band=window)
        problem = draw_problem(intervals, heads, (dim, dim), torch.bfloat16)
        kernels = select("cuda", torch.bfloat16, dim, dim, "hopper")
        operands = problem.query, problem.key, problem.value
        out, lse = kernels.attend(*operands, intervals, scale=problem.scale, sinks=torch.zeros(heads[0], device="cuda"))
        of_rows = out, lse, problem.dlse, intervals
        gradients = whole_backward(kernels, problem.dout, *operands, *of_rows, scale=problem.scale)
        for x in (out, lse, *gradients):
            assert x.isfinite().all()
        print(f"hopper {dim} narrow", flush=True)


def check_decoding() -> None:
    """A new token appended to a cache and to a paged one."""
    for page in (None, 16):
        cache = [torch.randn(2, 96, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        pages = None
        if page:
            cache = [x.view(12, page, 2, 64) for x in cache]
            pages = torch.arange(12, device="cuda", dtype=torch.int32).view(2, 6)
        q, k, v = (torch.randn(2, 1, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        lengths = torch.tensor([95, 17], device="cuda", dtype=torch.int32)
        for splits in (1, 3):
            out = flash_attn_with_kvcache(
                q, *cache, k, v, cache_seqlens=lengths, block_table=pages, causal=True, num_splits=splits
            )
            assert out.isfinite().all()
        print("decoding, pages of", page, flush=True)


PARTS = {
    **{
        f"{name}{dim}": functools.partial(check_kernels, name, dim)
        for name in ("triton", "hopper")
        for dim in (64, 128)
    },
    "hopper256": functools.partial(check_kernels, "hopper", 256),
    "modifiers": functools.partial(check_modifiers, "triton", 64),
    "hopper-modifiers": functools.partial(check_modifiers, "hopper", 128),
    "hopper-chunks": check_chunks,
    "blocks": functools.partial(check_blocks, "triton", 64),
    "hopper-blocks": lambda: [check_blocks("hopper", dim) for dim in (64, 128, 256)],
    "hopper-narrow": check_narrow,
    "decoding": check_decoding,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
    print("done")
