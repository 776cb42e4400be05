"""The training run: from a checked configuration to checkpoints, a log, a validation and a picture.

Ranks form a mesh ("data", "sequence"): those of one sequence group share each sequence, and every group draws its own
sequences. Everything in here is a collective unless it says otherwise: all ranks walk the same steps, rank 0 writes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh

from ringflash.configs.schema import Config, ModelConfig
from ringflash.errors import ArgumentError, CheckpointError, RankMismatchError, RingflashError
from ringflash.sharding import shard_batch
from ringflash.training import checkpoint
from ringflash.training.config import accumulation, compute_dtype, sequence_degree
from ringflash.training.data import Corpus, PackedBatches, ValidationBatches, prepare
from ringflash.training.engine import create_engine, parameter_shapes
from ringflash.training.metrics import PositionBin, PositionLoss, ProgressDisplay, ScalarLog, read_scalars
from ringflash.training.model import Transformer, attention_mask
from ringflash.training.ngram import baselines
from ringflash.training.optimizer import learning_rate
from ringflash.training.plots import plot_run


@dataclass(frozen=True)
class Validation:
    """Loss on held-out documents: bits per byte, and nats per token by length of context."""

    bits_per_byte: float
    positions: list[PositionBin]


def train(config: Config, device: torch.device) -> Path:
    """Run a training job on the ranks of the default process group; returns the run's folder.

    Args:
        config: checked, and the same on every rank.
        device: this rank's.

    Raises:
        ArgumentError, CheckpointError, DataError: on every rank, before the first step.
        CheckpointError: the final checkpoint could not be written.
    """
    folder = _run_folder(config)
    trainer = Trainer(config, device, folder)
    first = trainer.step
    rank, steps = dist.get_rank(), config.train.steps
    with (
        ScalarLog(folder, rank, config.logging.tensorboard, first) as log,
        ProgressDisplay(steps, first, rank, config.logging.progress) as progress,
    ):
        progress.note(trainer.description())
        validation = None
        clock, logged = time.monotonic(), first  # the clock stands still while something is saved or validated
        while trainer.step < steps:
            trainer.train_step()
            step = trainer.step
            if step % config.logging.every == 0 or step == steps:
                scalars, now = trainer.scalars(), time.monotonic()
                speed = (step - logged) * config.train.global_batch * config.train.seqlen / (now - clock)
                clock, logged = now, step
                log.write(step, scalars | {"train/tokens_per_second": speed})
                progress.update(step, scalars["train/loss"], speed)
            if _due(step, config.checkpoint.every) and step < steps:
                paused = time.monotonic()
                try:
                    trainer.save()
                except CheckpointError as error:  # a disk can be freed; what was learned so far goes on
                    progress.note(f"WARNING: {error}; training goes on")
                clock += time.monotonic() - paused
            if _due(step, config.train.validate_every) and step < steps:
                paused = time.monotonic()
                validation = trainer.validate()
                log.write(step, {"validation/bits_per_byte": validation.bits_per_byte})
                progress.note(f"step {step}: validation {validation.bits_per_byte:.4f} bits per byte")
                clock += time.monotonic() - paused
        if steps > first:
            progress.note(f"saved {trainer.save()}")
        validation = trainer.validate()
        log.write(trainer.step, {"validation/bits_per_byte": validation.bits_per_byte})
        if rank == 0:
            _report(trainer, validation, progress)
    dist.barrier()
    return folder


class Trainer:
    """Model, engine and data of a run, and how many steps are behind it.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        """Build everything, and continue from a checkpoint if the configuration says so and there is one."""
        self.config, self.device, self.folder = config, device, folder
        world = dist.get_world_size()
        degree = sequence_degree(config, world)
        mesh = init_device_mesh(device.type, (world // degree, degree), mesh_dim_names=("data", "sequence"))
        self.data_rank, self.data_ranks, self.degree = mesh["data"].get_local_rank(), world // degree, degree
        self.group = mesh["sequence"].get_group()
        self.corpus = _prepare_alike(config)
        self.accumulation = accumulation(config, world)
        self.batches = PackedBatches(
            self.corpus.train,
            config.train.seqlen,
            config.train.micro_batch,
            config.seed,
            self.data_rank,
            self.data_ranks,
        )
        self.vocab_size = vocabulary(config.model, self.corpus.tokenizer.vocab_size)
        torch.manual_seed(config.seed)
        with device:
            model = Transformer(
                config.model,
                self.vocab_size,
                config.attention,
                self.group,
                compute_dtype(config),
                config.engine.activation_checkpointing,
            )
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.resumed = self._find_checkpoint()
        self.step = 0
        if self.resumed is not None:
            self.resumed.check_shapes(parameter_shapes(model))
            state = self.resumed.state
            self.step = state["step"]
            self.batches.load_state_dict(state["data"])
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["random"])), dtype=torch.uint8))
        read = None if self.resumed is None else self.resumed.read
        self.engine = create_engine(model, config.engine, config.optimizer, self.accumulation, read, self.step)
        self._first_batches: list[dict] | None = None

    def train_step(self) -> None:
        """One optimizer step."""
        lr = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        self._latest = (*self.engine.train_step(self._next_batches(), lr), lr)
        self.step += 1

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
        scalars["train/bits_per_byte"] = loss / math.log(2) / self.corpus.bytes_per_token
        scalars["train/epoch"] = self.batches.epoch
        if self.device.type == "cuda":
            scalars["train/memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return scalars

    def validate(self) -> Validation:
        """Loss over the validation documents, or their first train.validation_sequences sequences."""
        train = self.config.train
        batches = ValidationBatches(
            self.corpus.validation, train.seqlen, train.micro_batch, self.data_rank, self.data_ranks
        )
        at_once = train.micro_batch * self.data_ranks
        limit = len(batches) if train.validation_sequences is None else -(-train.validation_sequences // at_once)
        positions, num_bytes = PositionLoss(train.seqlen), 0
        for _, counted in zip(range(limit), batches, strict=False):
            num_bytes += counted.num_bytes
            shard = self._deal(counted.batch)
            positions.add(shard["position_ids"], self.engine.evaluate(shard), shard["labels"])
        # Every rank of a sequence group counts the bytes of the whole sequence.
        sums = torch.cat([positions.totals.flatten(), torch.tensor([num_bytes / self.degree])]).to(self.device)
        dist.all_reduce(sums)
        positions.totals = sums[:-1].cpu().view_as(positions.totals)
        nats = positions.totals[0].sum().item()
        return Validation(nats / math.log(2) / sums[-1].item(), positions.bins())

    def save(self) -> Path:
        """Write a checkpoint of this step; RingflashError instead if it would hold weights that are not finite."""
        self.scalars()
        state = {
            "step": self.step,
            "data": self.batches.state_dict(),
            "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "model": dataclasses.asdict(self.config.model) | {"vocab_size": self.vocab_size},
            "config": dataclasses.asdict(self.config),
        }
        return checkpoint.save(
            self.folder / "checkpoints",
            self.step,
            self.engine.tensors(),
            self.engine.shapes,
            state,
            self.config.checkpoint.keep,
        )

    def description(self) -> str:
        """What is trained on what, in a line or two."""
        train = self.config.train
        start = f"continuing {self.resumed.path} at step {self.step}" if self.resumed else "from initial weights"
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.config.engine.name}, {compute_dtype(self.config)} on "
            f"{dist.get_world_size()} x {self.device.type}: {self.data_ranks} data x {self.degree} sequence ranks, "
            f"{train.global_batch} x {train.seqlen} tokens a step\n"
            f"{self.corpus.train.num_tokens:,} training tokens of {self.corpus.bytes_per_token:.2f} bytes; "
            f"{start}; writing to {self.folder}"
        )

    def _next_batches(self) -> list[dict]:
        if self._first_batches is not None:
            return self._first_batches
        batches = [self._deal(next(self.batches)) for _ in range(self.accumulation)]
        if self.config.train.overfit:
            self._first_batches = batches
        return batches

    def _deal(self, batch: dict) -> dict:
        on_device = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        attention = self.config.attention
        return shard_batch(on_device, self.group, attention.partition, attention_mask(attention))

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        resume = self.config.checkpoint.resume
        there = checkpoint.from_rank_0(checkpoint.newest(self.folder / "checkpoints"))
        path = {"auto": there, "never": None}.get(resume, Path(resume))
        found = None if path is None else checkpoint.Checkpoint(path)
        step = 0 if found is None else found.state["step"]
        if there is not None and checkpoint.step_of(there) > step:
            raise ArgumentError(
                f"checkpoint.resume={resume} starts at step {step}, but run_dir={self.folder} already holds "
                f"{there.name}; give another run_dir"
            )
        return found


def vocabulary(model: ModelConfig, tokens: int) -> int:
    """Rows of the embedding for a tokenizer of so many tokens."""
    if model.vocab_size is None:
        return -(-tokens // 64) * 64
    if model.vocab_size < tokens:
        raise ArgumentError(f"model.vocab_size={model.vocab_size} is less than the {tokens} tokens of the tokenizer")
    return model.vocab_size


def _run_folder(config: Config) -> Path:
    """The run's folder, made by rank 0, whose clock names it."""
    box = [config.run_dir or f"runs/{config.name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"]
    dist.broadcast_object_list(box, src=0)
    folder, problem = Path(box[0]), None
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
        except OSError as error:
            problem = str(error)
    problem = checkpoint.from_rank_0(problem)
    if problem is not None:
        raise ArgumentError(f"run_dir={folder}: cannot write there: {problem}")
    return folder


def _prepare_alike(config: Config) -> Corpus:
    """The corpus, once it is sure that all ranks read the same: machines may differ in files and Python versions."""
    try:
        corpus, said = prepare(config.data), None
    except RingflashError as error:
        corpus, said = error, f"{type(error).__name__}: {error}"
    read: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(read, said or corpus.train.identity)
    if isinstance(corpus, RingflashError):
        raise corpus
    for rank, other in enumerate(read):
        if other != read[0]:
            raise RankMismatchError(
                f"ranks read different text from data.path={config.data.path}: {read[0]} on rank 0, "
                f"{other} on rank {rank}"
            )
    return corpus


def _report(trainer: Trainer, validation: Validation, progress: ProgressDisplay) -> None:
    """Print and keep what the run came to; rank 0 only."""
    others = baselines(trainer.corpus) if trainer.config.logging.baselines else {}
    progress.note("validation, bits per byte:")
    for name, bits in {**others, "this model": validation.bits_per_byte}.items():
        progress.note(f"  {name:<12}{bits:.3f}")
    results = {"step": trainer.step, "bits_per_byte": validation.bits_per_byte, "baselines": others}
    results["loss_by_context"] = [position._asdict() for position in validation.positions]
    (trainer.folder / "results.json").write_text(json.dumps(results, indent=1))
    if trainer.config.logging.plot:
        scalars = read_scalars(trainer.folder / "metrics.jsonl")
        curves = (scalars.get(f"{part}/bits_per_byte", []) for part in ("train", "validation"))
        plot_run(trainer.folder / "training.png", *curves, others, validation.positions, trainer.config.name)
        progress.note(f"picture: {trainer.folder / 'training.png'}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
