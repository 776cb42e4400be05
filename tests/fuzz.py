"""Random masks, lengths and features for as long as one likes, on one device or over the ranks of torchrun.

    python tests/fuzz.py --seconds 60 --head-dim 128
    torchrun --nproc-per-node 2 tests/fuzz.py --seconds 60 --head-dim 64 --heads 8/1 --features sinks,softcap

Problems have as many tokens as tests have no time for, so that kernels work in several chunks, and ranks in several
launches. Each is held against its definition in float64. What is reported is an error of more than three times that of
the definition in the problem's own dtype, plus a hundredth of the mean: no rounding, but pairs too many or too few.
The numbers that a report names make its problem again: `--seed N --first K`. Exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "parallel"))

import torch
import torch.distributed as dist
from attention_cases import Answer, Case, Tensors, by_definition, exact, largest_errors, solve, tensors
from cases import visible
from torch import Tensor

from ringflash import ArgumentError, Mask, Sharding
from ringflash.functional import attention

FEATURES = ("softcap", "alibi", "dropout", "padding", "sinks", "deterministic")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SOFTCAP, DROPOUT = 5.0, 0.25
RESULTS = ("out", "lse", "dquery", "dkey", "dvalue", "dsinks")


@dataclass(frozen=True)
class Problem:
    """A mask over some tokens, and how they are sharded."""

    mask: Mask
    length: int
    partition: str
    head_ranks: int | None
    plan: str | None


def draw_mask(draw: random.Random, n: int) -> Mask:
    """Any composition of rules for n tokens, most of them windows."""
    kinds = ["causal", "bidirectional", "window", "window", "window", "spans", "shared prefix"]
    kind = draw.choice(kinds)
    if kind == "spans":
        mask = Mask.causal([x for x in itertools.pairwise(sorted(set(_cuts(draw, n, 8)))) if draw.random() < 0.5])
    elif kind == "shared prefix":
        lengths = [stop - start for start, stop in itertools.pairwise([0, *_cuts(draw, n, 6), n])]
        mask = Mask.shared_prefix(lengths[:1], [lengths[1:]]) if len(lengths) > 1 else Mask.causal()
    elif kind == "window":
        right = draw.choice([0, 0, 0, 3, _some(draw, n)])
        mask = Mask.sliding_window(_some(draw, n), right, sink=draw.choice([0, 0, 1, 4, 17, 130]))
    else:
        mask = Mask.causal() if kind == "causal" else Mask.bidirectional()
    if draw.random() < 0.4:
        mask &= Mask.documents([0, *_cuts(draw, n, draw.choice([2, 6, 40, 200])), n])
    if kind in kinds[:3] and draw.random() < 0.15:
        mask &= Mask.chunked(draw.randint(1, n))
    if kind in kinds[:3] and draw.random() < 0.15:
        mask &= Mask.prefix_lm(_some(draw, n))
    if draw.random() < 0.15:
        sizes = draw.choice([(64, 64), (128, 128), (128, 64), (draw.randint(5, 300), draw.randint(5, 300))])
        generator = torch.Generator().manual_seed(draw.randint(0, 2**31))
        shown = torch.rand(*(-(-n // size) for size in sizes), generator=generator) < draw.choice([0.1, 0.3, 0.7])
        mask &= Mask.blocks(shown, sizes)
    return mask


def _cuts(draw: random.Random, n: int, most: int) -> list[int]:
    return sorted(draw.randint(0, n) for _ in range(draw.randint(0, most)))


def _some(draw: random.Random, n: int) -> int:
    """A number of tokens: few, about a kernel's block, or many."""
    return draw.choice([draw.randint(0, 5), draw.randint(0, 130), draw.choice([127, 128, 255, 511, 1023]), n // 2])


def draw_problem(draw: random.Random, longest: int, ranks: int, heads: tuple[int, int]) -> Problem:
    """Any problem; the same on all ranks that draw alike."""
    n = draw.choice([draw.randint(1, min(300, longest)), *(draw.randint(min(1000, longest), longest) for _ in "ab")])
    head_ranks = draw.choice([None, 1, ranks]) if heads[0] % ranks == 0 else 1
    plan = draw.choice([None, "ring", "direct-0", "direct-1"]) if ranks > 1 and head_ranks == 1 else None
    partition = draw.choice(["zigzag", "contiguous", "balanced", "stripe"])
    return Problem(draw_mask(draw, n), n, partition, head_ranks, plan)


@dataclass(frozen=True)
class Shown:
    """A mask in the place of `attention_cases.Rules`.

    Attributes:
        seen: dense (queries, keys) matrix of it, on the CPU.
    """

    seen: Tensor

    def visible(self, queries: int, keys: int) -> Tensor:
        """The same where tensors are made by default."""
        assert self.seen.shape == (queries, keys)
        return self.seen.to(torch.get_default_device())


class Solver:
    """Solves problems with random tensors, by ringflash and by definition.

    Args:
        options: heads, dimensions, dtype, features.
        device: of the tensors.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._device, self._deterministic = device, "deterministic" in options.features
        self._settings = {
            "heads": options.heads,
            "dims": (options.head_dim, options.value_head_dim or options.head_dim),
            "dtype": DTYPES[options.dtype],
            "scale": options.head_dim**-0.5,
            "softcap": SOFTCAP if "softcap" in options.features else 0.0,
            "alibi": "heads" if "alibi" in options.features else "",
            "dropout": DROPOUT if "dropout" in options.features else 0.0,
            "padding": "padding" in options.features,
            "sinks": "sinks" in options.features,
        }

    def errors(self, problem: Problem, seed: int) -> list[str]:
        """Results that are not the definition's, in words.

        Raises:
            ArgumentError: what was drawn is refused.
        """
        sharding = Sharding(
            problem.mask, seqlen=problem.length, partition=problem.partition, head_ranks=problem.head_ranks,
            plan=problem.plan,
        )  # fmt: skip
        shown = Shown(visible(problem.mask, problem.length))
        case = Case(((problem.length, problem.length),), shown, seed=seed, **self._settings)
        drawn = tensors(case)
        given = replace(drawn, **{name: x.to(self._device) for name, x in vars(drawn).items() if x is not None})
        with self._device:  # where the definition makes its own tensors
            right = exact(case, given)
            own = solve(lambda *x: by_definition(case, given, *x), given)
        found = self._by_ringflash(case, sharding, given)
        errors = (largest_errors(results, right) for results in (found, own))
        return [
            f"{name}: error {mine:.3g}, by definition in the dtype {theirs:.3g}"
            for name, mine, theirs, x in zip(RESULTS, *errors, right, strict=False)
            if not mine <= 3 * theirs + 0.01 * x[x.isfinite()].abs().mean().nan_to_num().item() + 1e-4
        ]

    def _by_ringflash(self, case: Case, sharding: Sharding, given: Tensors) -> Answer:
        def share(x: Tensor, dim: int) -> Tensor:
            return sharding.shard(x[None], dim).contiguous()

        leaves = [share(x, 1).requires_grad_() for x in (given.query, given.key, given.value)]
        if given.sinks is not None:
            leaves.append(given.sinks.clone().requires_grad_())
        out, lse = attention(
            *leaves[:3], sharding=sharding, scale=case.scale, softcap=case.softcap, alibi_slopes=given.slopes,
            dropout=case.dropout, dropout_seed=given.dropout_seed,
            key_padding_mask=None if given.padding is None else share(given.padding, 1),
            sinks=None if given.sinks is None else leaves[3], deterministic=self._deterministic,
        )  # fmt: skip
        upstream = share(given.dout, 1), share(given.dlse, 2)
        *gradients, last = torch.autograd.grad((out, lse), leaves, upstream)
        if given.sinks is not None and sharding.ranks > 1:
            dist.all_reduce(last)
        whole = [sharding.unshard(x.detach(), dim)[0] for x, dim in ((out, 1), (lse, 2))]
        whole += [sharding.unshard(x, 1)[0] for x in (*gradients, last)[:3]]
        return *whole, *([] if given.sinks is None else [last])


def main(arguments: Sequence[str] | None = None) -> tuple[int, list[str]]:
    """Run problems until time is up; how many, and what was wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--longest", type=int, default=5000, help="tokens of a problem at most")
    parser.add_argument("--heads", type=lambda x: tuple(map(int, x.split("/"))), default=(4, 2), help="as 4/2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-head-dim", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--features", type=lambda x: set(x.split(",")), default=set(), help=", ".join(FEATURES))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if unknown := options.features - set(FEATURES):
        parser.error(f"--features {','.join(sorted(unknown))}; allowed are {', '.join(FEATURES)}")
    ranks, device = int(os.environ.get("WORLD_SIZE", "1")), torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    solver, begin, count, wrong = Solver(options, device), time.monotonic(), 0, []
    for number in itertools.count(options.first):
        over = torch.tensor(time.monotonic() - begin > options.seconds)
        if ranks > 1:
            dist.broadcast(over, 0)
        if over:
            break
        problem = draw_problem(random.Random(f"{options.seed} {number}"), options.longest, ranks, options.heads)
        try:
            errors = solver.errors(problem, number)
        except ArgumentError as error:
            print(f"problem {number} is refused: {str(error)[:200]}", flush=True)
            continue
        count += 1
        if errors:
            wrong.append(f"problem {number} of seed {options.seed}: {errors}, {problem}"[:1000])
            print(wrong[-1], flush=True)
    if ranks > 1:
        dist.destroy_process_group()
    return count, wrong


if __name__ == "__main__":
    problems, reports = main()
    print(f"{problems} problems, {len(reports)} wrong: {' '.join(sys.argv[1:])}", flush=True)
    sys.exit(bool(reports))
