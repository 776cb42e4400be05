"""What a training run holds on each rank: data, model, engine, and how many steps are behind it.

Ranks form a mesh ("data", "sequence"): those of one sequence group share each sequence, and every group draws its own
sequences. Everything in here is a collective unless it says otherwise.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringflash.configs.schema import Config
from ringflash.errors import RankMismatchError, RingflashError
from ringflash.training.checkpoint.host_copy import copy_bytes
from ringflash.training.checkpoint.saving import Saver
from ringflash.training.config.derived import (
    accumulation,
    compute_dtype,
    saves_beside_training,
    sequence_degree,
    steps_of,
)
from ringflash.training.corpus.batching import PackedBatches, ValidationBatches
from ringflash.training.corpus.tokenizer import fingerprint
from ringflash.training.corpus.training_data import TrainingData, read_data
from ringflash.training.engines.base import Piece
from ringflash.training.engines.create import create_engine
from ringflash.training.engines.optimizer import trained
from ringflash.training.engines.schedule import schedule
from ringflash.training.estimate.operations import operations_of
from ringflash.training.model.create import create_model
from ringflash.training.model.decoder import Decoder
from ringflash.training.ranks import from_all
from ringflash.training.run.forecast import Forecast
from ringflash.training.run.interruption import Answer
from ringflash.training.run.loader import ShardedBatches
from ringflash.training.run.needle import Needle, haystacks, needle_lengths
from ringflash.training.run.origin import to_go_on_from, to_start_from
from ringflash.training.run.position_loss import PositionBin, PositionLoss
from ringflash.training.run.throughput import Speed, Throughput

Made = TypeVar("Made")


@dataclass(frozen=True)
class Validation:
    """Loss on held-out documents: in nats per token, for texts in bits per byte, and by length of context."""

    loss: float
    bits_per_byte: float | None
    positions: list[PositionBin]


class Trainer:
    """Model, engine and data of a run, and how many steps are behind it.

    Attributes:
        step: optimizer steps done.
        steps: of the whole run.
        saver: writes its checkpoints; to be entered while it trains.
        throughput: how fast steps are.
    """

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        """Build everything, and continue from a checkpoint if the configuration says so and there is one."""
        self.config, self.device, self.folder = config, device, folder
        world = dist.get_world_size()
        degree = sequence_degree(config, world)
        mesh = init_device_mesh(device.type, (world // degree, degree), mesh_dim_names=("data", "sequence"))
        self.data_rank, self.data_ranks, self.degree = mesh["data"].get_local_rank(), world // degree, degree
        self.group = mesh["sequence"].get_group()
        self._forecast = Forecast(config, device)  # before anything takes long
        self.data: TrainingData = _alike(
            lambda: read_data(config), lambda data: data.identity, f"text from data.path={config.data.path}"
        )
        if config.logging.needle:
            needle_lengths(self.data.tokenizer, config.train.seqlen)
        self._passed_over = [str(passed_over) for passed_over in self.data.passed_over]
        self.accumulation = accumulation(config, world)
        batches = PackedBatches(self.data.samples, config.train.micro_batch, self.data_rank, self.data_ranks)
        torch.manual_seed(config.seed)
        self.model: Decoder = _alike(
            lambda: create_model(config, self.data.tokenizer.vocab_size, self.group),
            lambda model: model.source(),
            f"weights from model.path={config.model.path}",
        )
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self._forecast.see_model(self.model)
        self.throughput = Throughput(device, operations_of(self.model), self._forecast.peak)
        self.learned = sum(weight.numel() for _, weight in trained(self.model))
        self.resumed, self.set_aside = to_go_on_from(config, folder, self.model)
        self.started_from = None if self.resumed else to_start_from(config, self.model, self.data.tokenizer)
        self.step = 0
        self.steps = steps_of(config, self.data.samples.samples_per_epoch)
        self._rate = schedule(config.optimizer, self.steps)
        self.saver = Saver(folder / "checkpoints", device, config.checkpoint.keep)
        if self.resumed is not None:
            state = self.resumed.state
            self.step = state["step"]
            batches.load_state_dict(state["data"])
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["random"])), dtype=torch.uint8))
        self.batches = ShardedBatches(batches, self._shard_to_learn)
        # Ahead of the engine, which divides what is left of host memory.
        if saves_beside_training(config, self.steps):
            self.saver.reserve(copy_bytes(self.learned, world, config.checkpoint.only_weights))
        read, weights = (None if found is None else found.read for found in (self.resumed, self.started_from))
        self.engine = create_engine(
            self.model, device, config.engine, config.optimizer, self.accumulation, read, self.step, weights
        )
        self.engine.before_update = self.saver.protect
        if self.resumed is not None:
            self.saver.saved = self.step, self.resumed.path
        self._first_batches: list[dict] | None = None
        self._answer = Answer()
        self._forecast.see_batches(self.batches, self.accumulation, self.data.tokenizer.vocab_size)

    def train_step(self, stop: Callable[[], bool]) -> bool:
        """One optimizer step; returns whether a rank wants to stop, and all ranks have to: see `interruption`.

        Args:
            stop: whether this rank wants to.
        """
        lr, waited, train = self._rate(self.step), self.batches.waited, self.config.train
        batches = self._next_batches()
        loss, norm, asked = self.engine.train_step(batches, lr, stop)
        self._latest = loss, norm, lr
        self.step += 1
        pairs = sum(batch["sharding"].pairs for batch in batches)
        self.throughput.step(train.global_batch * train.seqlen, pairs, self.batches.waited - waited)
        return self._answer(asked)

    def scalars(self) -> dict[str, float]:
        """Scalars of the latest step by name; waits for the device.

        Raises:
            RingflashError: the loss or the gradient is not finite.
        """
        loss, norm, lr = (float(value) for value in self._latest)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RingflashError(
                f"the loss is {loss} at step {self.step}, the gradient's norm {norm}; a lower "
                f"optimizer.lr={self.config.optimizer.lr} or a longer optimizer.warmup_steps may help"
            )
        scalars = {"train/loss": loss, "train/gradient_norm": norm, "train/learning_rate": lr}
        if self.data.bytes_per_token is not None:
            scalars["train/bits_per_byte"] = loss / math.log(2) / self.data.bytes_per_token
        scalars["train/epoch"] = self.batches.epoch
        return scalars

    def validate(self, stop: Callable[[], bool]) -> Validation | None:
        """Loss over the validation documents, or their first train.validation_sequences sequences.

        Args:
            stop: whether this rank wants the run to stop; then there is no result, on all ranks.
        """
        train = self.config.train
        batches = ValidationBatches(
            self.data.validation, train.micro_batch, self.data_rank, self.data_ranks, train.validation_sequences
        )
        positions, num_bytes = PositionLoss(train.seqlen), 0
        for counted in batches:
            num_bytes += counted.num_bytes
            shard = self._shard(counted.batch)
            positions.add(shard["position_ids"], self.engine.evaluate(shard), shard["labels"])
            asked = torch.full((), float(stop()), device=self.device)
            dist.all_reduce(asked)
            if asked:
                return None
        # Every rank of a sequence group counts the bytes of the whole sequence.
        sums = torch.cat([positions.totals.flatten(), torch.tensor([num_bytes / self.degree])]).to(self.device)
        dist.all_reduce(sums)
        positions.totals = sums[:-1].cpu().view_as(positions.totals)
        nats, predictions = positions.totals.sum(1).tolist()
        bits = nats / math.log(2) / sums[-1].item() if self.data.counts_bytes else None
        return Validation(nats / max(1, predictions), bits, positions.bins())

    def find_needles(self) -> list[Needle]:
        """How surely the model finds a sentence again, by length of the context and depth in it."""
        found = []
        for hay in haystacks(self._hay(), self.data.tokenizer, self.config.train.seqlen):
            loss = self.engine.evaluate(self._shard(hay.batch)).sum().double()
            dist.all_reduce(loss, group=self.group)
            found.append(Needle(hay.length, hay.depth, math.exp(-loss.item())))
        return found

    def _hay(self) -> list[np.ndarray]:
        """Tokens of the held-out documents."""
        return [packing.documents.tokens for packing in self.data.validation]

    def save(self) -> Path:
        """Write a checkpoint of this step; RingflashError instead if it would hold weights that are not finite."""
        return self.saver.save(*self._saved())

    def begin_save(self) -> None:
        """The same while training goes on; what comes of it is news of the saver."""
        self.saver.begin(*self._saved())

    def _saved(self) -> tuple[int, Iterator[Piece], dict[str, tuple[int, ...]], dict[str, Any]]:
        """What a saver is given."""
        self.scalars()
        state = {
            "step": self.step,
            "data": self.batches.state_dict(),
            "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "model": self.model.description(),
            "tokenizer": fingerprint(self.data.tokenizer),
            "config": dataclasses.asdict(self.config),
        }
        sizes = {name: shape for name, shape in self.engine.sizes().items() if self._saves(name)}
        pieces = (piece for piece in self.engine.pieces() if self._saves(piece.name))
        return self.step, pieces, sizes, state

    def _saves(self, name: str) -> bool:
        return name.startswith("weight/") or not self.config.checkpoint.only_weights

    def description(self) -> str:
        """What is trained on what, in two lines, and what of the data is passed over, in one more."""
        train = self.config.train
        start = f"continuing {self.resumed.path} at step {self.step}" if self.resumed else self._start()
        return (
            f"{self._size()}, {self.config.engine.name}, {compute_dtype(self.config)} on "
            f"{dist.get_world_size()} x {self.device.type}: {self.data_ranks} data x {self.degree} sequence ranks, "
            f"{train.global_batch} x {train.seqlen} tokens a step\n"
            f"{self._read()}; {start}; writing to {self.folder}"
            + "".join(f"\n{line}" for line in self._forecast.lines())
            + "".join(f"\nset aside: {problem}" for problem in self.set_aside)
            + "".join(f"\n{said}" for said in (*self._passed_over, self.model.passed_over()) if said)
        )

    def measured(self, speed: Speed) -> str:
        """What steps on GPUs took, beside what was expected of them, in a line."""
        host = self.model.memory.host
        return self._forecast.beside(speed, 0 if host is None else host.taken)

    def decided(self) -> str | None:
        """What was decided about memory in the latest step, if anything; once."""
        memory = self.model.memory
        decision, memory.decision = memory.decision, None
        return decision

    def passed_over_since(self) -> list[str]:
        """What of the data is passed over, where that is more than at the beginning, as it is of streams."""
        now = [str(passed_over) for passed_over in self.data.passed_over]
        return [said for said, before in zip(now, self._passed_over, strict=True) if said != before]

    def _size(self) -> str:
        beside = f", {self.learned / 1e6:.2f} M of them in adapters" if self.learned < self.parameters else ""
        return f"{self.parameters / 1e6:.2f} M parameters{beside}"

    def _start(self) -> str:
        path = self.config.model.path if self.started_from is None else self.started_from.path
        return "from initial weights" if path is None else f"from the weights of {path}"

    def _read(self) -> str:
        data = self.data
        tokens = "a stream of tokens" if data.num_tokens is None else f"{data.num_tokens:,} training tokens"
        each = "" if data.bytes_per_token is None else f" of {data.bytes_per_token:.2f} bytes"
        cut = f", {data.cut:,} chats are longer than a sequence, and cut" if data.cut else ""
        return tokens + each + cut

    def _next_batches(self) -> list[dict]:
        if self._first_batches is not None:
            return self._first_batches
        batches = [self.batches.take() for _ in range(self.accumulation)]
        if self.config.train.overfit:
            self._first_batches = batches
        return batches

    def _shard(self, batch: dict) -> dict:
        """This rank's part of a batch, on its device; runs in the loader's thread."""
        shard = self.model.shard(batch)
        shard["sharding"].prepare(self.device)
        return {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in shard.items()}

    def _shard_to_learn(self, batch: dict) -> dict:
        """The same, with its pairs counted, which takes a while of many tokens."""
        shard = self._shard(batch)
        _ = shard["sharding"].pairs
        return shard


def _alike(make: Callable[[], Made], identity: Callable[[Made], str], what: str) -> Made:
    """What is made from files, once it is sure that all ranks read the same: machines may differ in them.

    Args:
        make: reads them; raises RingflashError, which the others then hear of.
        identity: tells what was read from others.
        what: the files, for the message.
    """
    made = failed = None
    try:
        made = make()
        said = identity(made)
    except RingflashError as error:
        failed, said = error, f"{type(error).__name__}: {error}"
    read = from_all(said)
    if failed is not None:
        raise failed
    for rank, other in enumerate(read):
        if other != read[0]:
            raise RankMismatchError(f"ranks read different {what}: {read[0]} on rank 0, {other} on rank {rank}")
    assert made is not None
    return made
