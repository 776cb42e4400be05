"""Checks and times the Hopper kernels on one GPU, beside cuDNN in the same process.

    python docs/benchmarks/hopper.py check 128               errors against float64 over masks, layouts, tails, carries
    python docs/benchmarks/hopper.py time 128 out.json       TFLOP/s by sequence length, causal and full
    python docs/benchmarks/hopper.py tune 128 out.json       the same for other shapes of the launch

FLOPs are counted over visible pairs; backward counts 2.5 x forward. Times are medians of CUDA events.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from ringflash.kernels import hopper, reference
from ringflash.kernels.hopper import backward, forward
from ringflash.kernels.hopper.backward_tiles import BACKWARD_TILES, BackwardTiles
from ringflash.kernels.intervals import KeyIntervals, causal_intervals

HEADS = {64: 32, 128: 16, 256: 8}
TOKENS = 32768
LENGTHS = (2048, 8192, 16384, 32768)


def document_intervals(lengths: list[int], causal: bool, window: int | None = None) -> KeyIntervals:
    """Rows of documents laid end to end that see only their own document (and only `window` keys up to themselves)."""
    ends = torch.tensor(lengths).cumsum(0)
    start = torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))
    stop = torch.repeat_interleave(ends, torch.tensor(lengths))
    row = torch.arange(int(ends[-1]))
    if causal:
        stop = row + 1
    if window:
        start = torch.maximum(start, row + 1 - window)
    return KeyIntervals(start.int().cuda(), stop.int().cuda(), int(ends[-1]))


def dense_intervals(query_count: int, key_count: int) -> KeyIntervals:
    """Every row sees every key."""
    start = torch.zeros(query_count, dtype=torch.int32, device="cuda")
    return KeyIntervals(start, torch.full_like(start, key_count), key_count)


def prepared_forward(
    q: Tensor, k: Tensor, v: Tensor, intervals: KeyIntervals, tiles: forward.ForwardTiles
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The forward with given sizes."""
    launch = forward.PreparedForward(q, k, v, intervals, q.shape[2] ** -0.5, None, q.dtype, tiles)
    return partial(launch, q, k, v, intervals, None)


def prepared_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    carry: Tensor | None,
    dtype: torch.dtype,
    tiles: BackwardTiles,
    deterministic: bool = False,
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The backward with given sizes, gradients in `dtype`; a carry is overwritten."""
    operands, numbers = (dout, q, k, v), (lse, delta, carry)
    scale = q.shape[2] ** -0.5
    launch = backward.PreparedBackward(operands, numbers, None, intervals, scale, dtype, tiles, deterministic)
    return lambda: launch(operands, numbers, None, intervals, dtype)[:3]


def cases() -> dict[str, tuple[KeyIntervals, int, int]]:
    """Intervals, query heads and key heads by name; lengths are odd on purpose."""
    return {
        "causal": (causal_intervals(1000, 1000, "cuda"), 4, 4),
        "causal, grouped": (causal_intervals(1153, 1153, "cuda"), 8, 2),
        "full, longer keys": (dense_intervals(777, 1301), 6, 3),
        "causal, more keys": (causal_intervals(300, 1100, "cuda"), 4, 4),
        "rows without keys": (causal_intervals(1000, 300, "cuda"), 4, 2),
        "window": (document_intervals([1500], True, 300), 4, 2),
        "narrow window": (document_intervals([4000], True, 70), 4, 1),
        "documents": (document_intervals([5, 200, 1, 130, 64, 700, 33, 128], True), 4, 2),
        "documents, full": (document_intervals([5, 200, 1, 130, 64, 300, 33, 128], False), 4, 4),
        "one row": (dense_intervals(1, 1), 2, 1),
        "short": (dense_intervals(63, 65), 2, 2),
        "decode": (dense_intervals(3, 3000), 8, 1),
        "many tiles": (causal_intervals(2100, 2100, "cuda"), 16, 8),
    }


def random(shape: tuple[int, ...], dtype: torch.dtype, head_major: bool = False) -> Tensor:
    """Normal values; with `head_major` the memory order is (heads, rows, dim)."""
    if head_major:
        return torch.randn(shape[1], shape[0], shape[2], device="cuda").to(dtype).transpose(0, 1)
    return torch.randn(shape, device="cuda").to(dtype)


def distance(x: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    x, expected = x.double(), expected.double()
    size = max(expected.norm().item(), 0.05 * expected.numel() ** 0.5)  # some gradients are zero but for rounding
    return (x - expected).norm().item() / size


def check_forward(dim: int, dtype: torch.dtype) -> bool:
    """Print one line for each case; whether all are right."""
    fine = True
    for name, (intervals, heads, key_heads) in cases().items():
        rows, keys = intervals.query_count, intervals.key_count
        head_major = name in ("causal", "window")
        q = random((rows, heads, dim), dtype, head_major)
        k, v = (random((keys, key_heads, dim), dtype, head_major) for _ in range(2))
        scale = dim**-0.5
        q = q * (4 if name == "many tiles" else 1)  # sharper weights make row maxima grow late
        earlier = (torch.randn(rows, heads, dim, device="cuda"), torch.randn(heads, rows, device="cuda"))
        earlier[1][:, ::7] = -torch.inf
        earlier[0][::7] = 0
        for carried, out_dtype in ((False, dtype), (False, torch.float32), (True, torch.float32), (True, dtype)):
            carry = tuple(x.clone() for x in earlier) if carried else None
            out, lse = hopper.attend(q, k, v, intervals, scale=scale, carry=carry, out_dtype=out_dtype)
            again = tuple(x.clone() for x in earlier) if carried else None
            out2, lse2 = hopper.attend(q, k, v, intervals, scale=scale, carry=again, out_dtype=out_dtype)
            torch.cuda.synchronize()
            expected = reference.attend(
                q, k, v, intervals, scale=scale, carry=earlier if carried else None, out_dtype=torch.float64
            )
            error = distance(out, expected[0])
            finite = expected[1].isfinite()
            lse_error = (lse - expected[1])[finite].abs().max().item() if finite.any() else 0.0
            same = torch.equal(out, out2) and torch.equal(lse, lse2)
            right = error < (6e-3 if dtype == torch.bfloat16 else 1e-3) and lse_error < 2e-3 and same
            right &= torch.equal(lse.isfinite(), finite) and out.dtype == out_dtype
            fine &= right
            print(
                f"{'ok ' if right else 'BAD'} D{dim} {str(dtype)[6:]:8s} {name:20s} "
                f"carry={carried!s:5} out={str(out_dtype)[6:]:8s} error {error:.1e} lse {lse_error:.1e}"
                f"{'' if same else ' NOT REPEATABLE'}",
                flush=True,
            )
    return fine


def check_backward(dim: int, dtype: torch.dtype, variants: dict[str, dict]) -> bool:
    """Print one line for each case; whether all are right."""
    fine, scale = True, dim**-0.5
    for name, (intervals, heads, key_heads) in cases().items():
        rows, keys = intervals.query_count, intervals.key_count
        head_major = name in ("causal", "window")
        q, dout = (random((rows, heads, dim), dtype, head_major) for _ in range(2))
        k, v = (random((keys, key_heads, dim), dtype, head_major) for _ in range(2))
        out, lse = reference.attend(q, k, v, intervals, scale=scale)
        delta = hopper.row_delta(dout, out)
        earlier = torch.randn(rows, heads, dim, device="cuda")
        arguments = (dout, q, k, v, lse, delta, intervals)
        expected = reference.attend_backward(
            *arguments, scale=scale, dquery_dtype=torch.float64, dkey_dtype=torch.float64
        )
        for (variant, settings), carried in itertools.product(variants.items(), (False, True)):
            # With a carry as between the launches of a ring, otherwise as in a single one.
            made = torch.float32 if carried else dtype
            results = [
                prepared_backward(*arguments, earlier.clone() if carried else None, made, **settings)()
                for _ in range(2)
            ]
            torch.cuda.synchronize()
            wanted = (expected[0] + (earlier if carried else 0), *expected[1:])
            errors = [distance(x, y) for x, y in zip(results[0], wanted, strict=True)]
            fixed = slice(0 if settings.get("deterministic") else 1, 3)  # dQ is added in any order otherwise
            same = all(torch.equal(x, y) for x, y in zip(results[0][fixed], results[1][fixed], strict=True))
            tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
            right = same and all(error < tolerance for error in errors)
            fine &= right
            print(
                f"{'ok ' if right else 'BAD'} D{dim} {str(dtype)[6:]:8s} backward, {variant:20s} {name:20s} "
                f"carry={carried!s:5} errors {' '.join(f'{e:.1e}' for e in errors)}{'' if same else ' NOT REPEATABLE'}",
                flush=True,
            )
    return fine


def median_ms(run: Callable[[], object]) -> float:
    """Median time of one call."""
    return do_bench(run, warmup=20, rep=80, return_mode="median")


def pairs(intervals: KeyIntervals) -> int:
    """Visible (row, key) pairs."""
    return int((intervals.stop.long() - intervals.start.long()).clamp(min=0).sum())


def forward_variants(dim: int) -> dict[str, forward.ForwardTiles]:
    """Launch shapes to compare with the one in use."""
    tiles = {"in use": forward.FORWARD_TILES[str(dim)]}
    if dim == 64:
        tiles["2 consumers"] = dataclasses.replace(tiles["in use"], consumers=2, registers=(240, 24))
    return tiles


def backward_variants(dim: int) -> dict[str, dict]:
    """Arguments of prepared_backward to compare with those in use."""
    tiles = BACKWARD_TILES[str(dim)]
    return {"in use": {"tiles": tiles}, "in turn": {"tiles": tiles, "deterministic": True}}


def time_forward(dim: int, variants: dict[str, forward.ForwardTiles], lengths: tuple[int, ...]) -> list[dict]:
    """One row for each implementation, length and mask."""
    heads, rows = HEADS[dim], []
    for causal in (True, False):
        for length in lengths:
            batch = TOKENS // length
            intervals = document_intervals([length] * batch, causal)
            q, k, v = (random((TOKENS, heads, dim), torch.bfloat16) for _ in range(3))
            flops = 4 * pairs(intervals) * heads * dim
            per_batch = [x.view(batch, length, heads, dim).transpose(1, 2) for x in (q, k, v)]
            runs = {"cudnn": partial(cudnn_forward, per_batch, causal)}
            runs |= {name: prepared_forward(q, k, v, intervals, tiles) for name, tiles in variants.items()}
            rows += time_all(
                runs,
                flops,
                {"pass": "forward", "dim": dim, "heads": heads, "causal": causal, "batch": batch, "seqlen": length},
            )
    return rows


def cudnn_forward(tensors: list[Tensor], causal: bool) -> Tensor:
    """The peer that ships in torch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*tensors, is_causal=causal)


def time_backward(dim: int, variants: dict[str, dict], lengths: tuple[int, ...], group: int = 1) -> list[dict]:
    """As time_forward, `group` query heads on a key head; all that a training step's backward does, rounding too."""
    heads, rows = HEADS[dim], []
    for causal in (True, False):
        for length in lengths:
            batch = TOKENS // length
            intervals = document_intervals([length] * batch, causal)
            q, dout = (random((TOKENS, heads, dim), torch.bfloat16) for _ in range(2))
            k, v = (random((TOKENS, heads // group, dim), torch.bfloat16) for _ in range(2))
            scale, flops = dim**-0.5, 10 * pairs(intervals) * heads * dim
            out, lse = hopper.attend(q, k, v, intervals, scale=scale)
            operands = (dout, q, k, v)

            def ours(
                settings: dict,
                operands: tuple = operands,
                out: Tensor = out,
                lse: Tensor = lse,
                intervals: KeyIntervals = intervals,
            ) -> Callable[[], object]:
                launch = backward.PreparedBackward(
                    operands, (lse, lse, None), None, intervals, dim**-0.5, out.dtype, **settings
                )

                def run() -> object:
                    delta = hopper.row_delta(operands[0], out)
                    return launch(operands, (lse, delta, None), None, intervals, out.dtype)

                return run

            leaves = [x.view(batch, length, -1, dim).transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                result = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=group > 1)
            gradient = dout.view(batch, length, heads, dim).transpose(1, 2)
            runs = {"cudnn": partial(torch.autograd.grad, result, leaves, gradient, retain_graph=True)}
            runs |= {name: ours(settings) for name, settings in variants.items()}
            rows += time_all(
                runs,
                flops,
                {"pass": "backward", "dim": dim, "heads": heads, "causal": causal, "batch": batch, "seqlen": length},
            )
    return rows


def time_all(runs: dict[str, Callable[[], object]], flops: int, case: dict) -> list[dict]:
    """A row for each implementation of one case."""
    times = {name: median_ms(run) for name, run in runs.items()}
    return [{"impl": name, **case, "ms": ms, "tflops": flops / ms / 1e9} for name, ms in times.items()]


def compile_variants(dim: int) -> None:
    """Launch every shape once on little data, so that a later `tune` finds it in Triton's cache."""
    q, intervals = random((128, HEADS[dim], dim), torch.bfloat16), causal_intervals(128, 128, "cuda")
    for tiles in forward_variants(dim).values():
        out, lse = prepared_forward(q, q, q, intervals, tiles)()
    delta = hopper.row_delta(out, out)
    for settings in backward_variants(dim).values():
        prepared_backward(out, q, q, q, lse, delta, intervals, None, q.dtype, **settings)()


def print_table(rows: list[dict]) -> None:
    """One line for each implementation, pass and mask; columns are sequence lengths."""
    lengths = sorted({row["seqlen"] for row in rows})
    keys = dict.fromkeys((row["pass"], row["causal"], row["impl"]) for row in rows)
    for key in keys:
        cells = {r["seqlen"]: r["tflops"] for r in rows if (r["pass"], r["causal"], r["impl"]) == key}
        print(
            f"D{rows[0]['dim']} {key[0]:8s} {'causal' if key[1] else 'full':6s} {key[2]:30s}",
            *(f"{cells.get(n, float('nan')):6.0f}" for n in lengths),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["check", "compile", "time", "tune"])
    parser.add_argument("dim", type=int, choices=sorted(HEADS))
    parser.add_argument("path", nargs="?", help="JSON file for the rows")
    parser.add_argument("--forward", default="in use", help="shape of the forward to check")
    parser.add_argument("--backward", default="all", help="shapes of the backward to check and to tune, with ; between")
    parser.add_argument("--passes", default="forward,backward", help="to check and to tune")
    parser.add_argument("--group", type=int, default=1, help="query heads on a key head, for tune's backward")
    parser.add_argument("--dtypes", default="bfloat16,float16", help="for check")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.action == "compile":
        compile_variants(arguments.dim)
        return
    chosen = backward_variants(arguments.dim)
    if arguments.backward != "all":
        chosen = {name: chosen[name] for name in map(str.strip, arguments.backward.split(";"))}
    if arguments.action == "check":
        forward.FORWARD_TILES[str(arguments.dim)] = forward_variants(arguments.dim)[arguments.forward]
        check_backwards = partial(check_backward, variants=chosen)
        checks = [{"forward": check_forward, "backward": check_backwards}[x] for x in arguments.passes.split(",")]
        dtypes = [getattr(torch, name) for name in arguments.dtypes.split(",")]
        fine = [check(arguments.dim, dtype) for check in checks for dtype in dtypes]
        sys.exit(0 if all(fine) else 1)
    tune = arguments.action == "tune"
    dim = arguments.dim
    forwards = forward_variants(dim) if tune else {"ringflash": forward.FORWARD_TILES[str(dim)]}
    backwards = chosen if tune else {"ringflash": {"tiles": BACKWARD_TILES[str(dim)]}}
    times = {"forward": lambda: time_forward(dim, forwards, LENGTHS)}
    times["backward"] = lambda: time_backward(dim, backwards, LENGTHS, arguments.group)
    rows = []
    for name in arguments.passes.split(","):
        pass_rows = times[name]()
        print_table(pass_rows)
        rows += pass_rows
    if arguments.path:
        with open(arguments.path, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=0
            )


if __name__ == "__main__":
    main()
