"""Suite `tax`: what a training step of a small Llama loses to sequences being sharded; bf16 (fp32 on CPUs).

Run under torchrun. A step goes over as many sequences as there are GPUs, the same ones in each way, so every GPU
has as many tokens and pairs:

    none                 each GPU has a sequence of its own, attended by our kernels without a word to the others
    1 rank               the same by way of `SequenceParallel`, whose groups are of one rank
    n ranks, ring        n GPUs share a sequence, and go through n of them; `SequenceParallel` as it is by default
    n ranks, heads       the same with heads exchanged for tokens (Ulysses), `partition="contiguous"`

A step is forward and backward of each sequence, with its loss fused into the output head (`fuse_loss`), one all-reduce
of gradients over all ranks by DDP, which takes place in the last backward pass, and AdamW. Batches lie in memory of the
host, as loaders give them; sharding them and moving them to the GPU is part of a step. Gradients are those of "none"
but for rounding, which is checked before anything is timed: the command fails if the norm of the difference is more
than a TOLERANCE of theirs. Ways take turns, in another order in every round, so that a card that gets warmer favours
none of them; a figure is the median round, the slowest rank's. The tax is the share of none's tokens a second that is
lost.

`tokens=65536,131072` are lengths of a sequence; `shrink=8` divides layers, widths and vocabulary by 8, for CPUs.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ringflash.launch.benchmark_device import Place, joined, synchronize, version_of
from ringflash.launch.benchmark_models import SMALL_LLAMA, Model, PreTrainedModel, shrunk
from ringflash.launch.benchmark_report import Report
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.transport.select import transport_of
from ringflash.transformers import SequenceParallel
from ringflash.transformers.at_work import alone

if TYPE_CHECKING:
    from ringflash.launch.benchmark import Options

LENGTHS = (65536,)
REPEATS = 3
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}
"""Share of the gradients' norm; in bf16 each of two ways is 0.04 from the exact ones (docs/benchmarks/models.md)."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One measurement: tokens a second of one GPU; `tax` and `difference` of the gradients are those to "none"."""

    way: str
    ranks: int
    tokens: int
    milliseconds: float
    tokens_per_second: float
    tax: float
    difference: float


@dataclass(frozen=True)
class Way:
    """How the sequences of a step lie on the GPUs.

    Attributes:
        name: in tables.
        ranks: that share a sequence.
        partition: of `SequenceParallel`.
        plain: the model is called without it.
    """

    name: str
    ranks: int = 1
    partition: str | None = None
    plain: bool = False


def ways(ranks: int, heads: int) -> list[Way]:
    """Those that so many ranks and query heads allow; the first is what the others are held against."""
    found = [Way("none", plain=True), Way("1 rank")]
    for n in (n for n in range(2, ranks + 1) if ranks % n == 0):
        found.append(Way(f"{n} ranks, ring", n))
        if heads % n == 0:
            found.append(Way(f"{n} ranks, heads", n, "contiguous"))
    return found


def measure(options: Options) -> Iterator[Report]:
    """Rows on rank 0 after every round, nothing elsewhere."""
    small = shrunk("small Llama", SMALL_LLAMA, options.shrink)
    with joined() as place:
        if place.ranks == 1:
            raise SystemExit("suite=tax shards sequences over ranks; start it by torchrun, with two or more")
        # DDP is gone when that returns. Did it outlive the process group, gloo's threads would be joined by its
        # destructor, which holds the interpreter that they may wait for.
        yield from _measure_model(small, place, options)


def _measure_model(small: Model, place: Place, options: Options) -> Iterator[Report]:
    model = small.build(place.device, place.dtype).train()
    model.set_attn_implementation("ring")
    training, rows = Training(model, place), []
    settings = {
        "model": small.name,
        "parameters": small.weights(),
        "dtype": str(place.dtype).removeprefix("torch."),
        "ranks": place.ranks,
        "transformers": version_of("transformers"),
        "tolerance": TOLERANCE[place.dtype],
    }
    for tokens in options.tokens or LENGTHS:
        earlier = list(rows)
        for found in _rounds(training, tokens, options.repeats or REPEATS):
            rows = earlier + found
            if place.rank == 0:
                transport = {"transport": {n: transport_of(x).why for n, x in training.groups.items()}}
                yield Report(rows, table(rows), settings | transport, wrong=wrong(rows, TOLERANCE[place.dtype]))


def _rounds(training: Training, tokens: int, repeats: int) -> Iterator[list[Row]]:
    """Rows of all ways after each round that counts."""
    differences = _differences(training, tokens)
    first = training.ways[0]
    training.step(first, training.batches(first, tokens))  # since its first step an optimizer has its state
    order, times = random.Random(0), {way: [] for way in training.ways}
    for number in range(1, repeats + 1):
        for way in order.sample(training.ways, len(training.ways)):
            step = functools.partial(training.step, way, training.batches(way, tokens, number))
            times[way].append(_slowest(step, training.place))
        medians = {way: statistics.median(each) for way, each in times.items()}
        none = medians[first]
        yield [
            Row(way.name, way.ranks, tokens, x, tokens / x * 1e3, 1 - none / x, differences[way])
            for way, x in medians.items()
        ]


def _differences(training: Training, tokens: int) -> dict[Way, float]:
    """Of each way's gradients to those of the first, as a share of their norm."""
    found: dict[Way, float] = {}
    expected: Tensor | None = None
    for way in training.ways:
        gradients = training.gradients(way, training.batches(way, tokens)).float()
        expected = gradients if expected is None else expected
        found[way] = ((gradients - expected).norm() / expected.norm()).item()
    return found


def _slowest(step: Callable[[], None], place: Place) -> float:
    """Milliseconds of a step on the slowest rank."""
    synchronize(place.device)
    dist.barrier()
    begin = time.perf_counter()
    step()
    synchronize(place.device)
    milliseconds = torch.tensor((time.perf_counter() - begin) * 1e3, dtype=torch.float64, device=place.device)
    dist.all_reduce(milliseconds, dist.ReduceOp.MAX)
    return milliseconds.item()


class Training:
    """A model that is trained by all ranks together, its sequences sharded in any way.

    Args:
        model: with attention "ring", the same on every rank, on the device of this place.
        place: where this process computes.

    Attributes:
        ways: in which it can be.
        groups: by how many ranks share a sequence, those that share this rank's.
    """

    def __init__(self, model: PreTrainedModel, place: Place) -> None:
        self.place = place
        self.ways = ways(place.ranks, model.config.num_attention_heads)
        self._vocabulary: int = model.config.vocab_size
        self._model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        shared = sorted({way.ranks for way in self.ways} - {1})
        self.groups = {n: cast(dist.ProcessGroup, dist.new_subgroups(n)[0]) for n in shared}
        self._sequences = {
            way: SequenceParallel(self._model, self.groups.get(way.ranks, ONE_DEVICE), way.partition)
            for way in self.ways
            if not way.plain
        }
        next(iter(self._sequences.values())).fuse_loss()  # of the model, whoever calls it: "none" as well
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def batches(self, way: Way, tokens: int, step: int = 0) -> list[Batch]:
        """The sequences of a step that this rank has a part of, random tokens; over all ranks each way has the same."""
        first = step * self.place.ranks + self.place.rank // way.ranks * way.ranks
        return [self._batch(number, tokens) for number in range(first, first + way.ranks)]

    def _batch(self, number: int, tokens: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(self._vocabulary, (1, tokens), generator=generator)
        return {"input_ids": ids, "labels": ids}

    def step(self, way: Way, batches: list[Batch]) -> None:
        """Forward and backward of its sequences, and the optimizer."""
        self._backward(way, batches)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gradients(self, way: Way, batches: list[Batch]) -> Tensor:
        """What the optimizer would be given, on end; it is not given."""
        self._backward(way, batches)
        gradients = torch.cat([cast(Tensor, x.grad).flatten() for x in self._model.parameters()])
        self._optimizer.zero_grad()
        return gradients

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.device == self.place.device:
            return x
        pinned = x.pin_memory() if self.place.device.type == "cuda" else x
        return pinned.to(self.place.device, non_blocking=True)

    def _backward(self, way: Way, batches: list[Batch]) -> None:
        sequence = self._sequences.get(way)
        for number, batch in enumerate(batches, 1):
            whole = batch if sequence is None else sequence.shard(batch)
            part = {name: self._moved(x) for name, x in whole.items()}
            reduced = nullcontext() if number == len(batches) else self._model.no_sync()
            with reduced, alone() if sequence is None else nullcontext():
                (self._model(**part, use_cache=False).loss / len(batches)).backward()


def wrong(rows: list[Row], tolerance: float) -> list[str]:
    """A line for each way whose gradients are not those of "none"."""
    return [
        f'{row.way}, {row.tokens} tokens: gradients differ from those of "none" by {row.difference:.2e} of their norm; '
        f"allowed is {tolerance:.1e}"
        for row in rows
        if not row.difference <= tolerance  # or no number
    ]


def table(rows: list[Row]) -> str:
    """A line for each length: tokens a second of a GPU, and what of none's is lost."""
    names = list(dict.fromkeys(row.way for row in rows))
    text = [f"{'tokens':>8s} " + " ".join(f"{name:>18s}" for name in names)]
    for tokens in dict.fromkeys(row.tokens for row in rows):
        cells = [f"{row.tokens_per_second:,.0f} ({row.tax:+.1%})" for row in rows if row.tokens == tokens]
        text.append(f"{tokens:8d} " + " ".join(f"{cell:>18s}" for cell in cells))
    return "\n".join([*text, "tokens/s of a GPU; in brackets the share of none's that is lost"])
