"""The training run: from a checked configuration to checkpoints, a log, a validation and a picture.

Everything in here is a collective unless it says otherwise: all ranks walk the same steps, and rank 0 writes, all ranks
checkpoints.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError, RingflashError, RunStoppedError
from ringflash.training.config.derived import TOKENIZER, saved_every
from ringflash.training.corpus.ngram import baselines
from ringflash.training.ranks import from_all, from_rank_0
from ringflash.training.run.interruption import StopSignals
from ringflash.training.run.needle import Needle, plot_needles
from ringflash.training.run.plots import plot_run
from ringflash.training.run.profiling import Profiler
from ringflash.training.run.progress import ProgressDisplay
from ringflash.training.run.scalars import ScalarLog, read_scalars
from ringflash.training.run.trackers import Trackers
from ringflash.training.run.trainer import Trainer, Validation

SETTLING = 2
"""Steps of a run that take longer, or less memory, than the others: the first compiles, and by it is decided what is
kept of blocks; the next one is the first of that."""


def train(config: Config, device: torch.device) -> Path:
    """Run a training job on the ranks of the default process group; returns the run's folder.

    Args:
        config: checked, and the same on every rank.
        device: this rank's.

    Raises:
        ArgumentError, CheckpointError, DataError: on every rank, before the first step.
        CheckpointError: the final checkpoint could not be written.
        RunStoppedError: on every rank after the same step, once it is saved: a rank received SIGTERM or SIGINT.
    """
    folder, logging = _run_folder(config), config.logging
    trainer = Trainer(config, device, folder)
    rank = dist.get_rank()
    _keep_tokenizer(trainer)
    trackers = Trackers(config, device, folder)
    with (
        ScalarLog(folder, rank, logging.tensorboard, trainer.step, trackers) as log,
        ProgressDisplay(trainer.steps, trainer.step, rank, logging.progress) as progress,
        trainer.saver,
    ):
        progress.note(trainer.description())
        with StopSignals() as signals:
            with Profiler(folder, logging.profile_steps, logging.profile_from, trainer.step) as profiler:
                _take_steps(trainer, log, progress, profiler, signals.received)
            validation = trainer.validate(signals.received)
            if validation is None:
                _stop(trainer, progress)
        for said in trainer.passed_over_since():
            progress.note(said)
        log.write(trainer.step, _figures(validation))
        needles = trainer.find_needles() if logging.needle else []
        if rank == 0:
            _report(trainer, validation, needles, progress)
    dist.barrier()
    return folder


def _keep_tokenizer(trainer: Trainer) -> None:
    """Write the tokenizer into the run's folder, which then holds all that `ringflash.export` needs."""

    def write() -> None:
        (trainer.folder / TOKENIZER).mkdir(exist_ok=True)
        trainer.data.tokenizer.save(trainer.folder / TOKENIZER)

    _by_rank_0(write, trainer.folder)


def _take_steps(
    trainer: Trainer, log: ScalarLog, progress: ProgressDisplay, profiler: Profiler, stop: Callable[[], bool]
) -> None:
    """All steps that are left, with what is due between them, and a checkpoint of the last."""
    config, first, throughput = trainer.config, trainer.step, trainer.throughput
    train, steps = config.train, trainer.steps
    settled, measured = first + SETTLING, False
    throughput.begin()
    logged = first
    while trainer.step < steps:
        stopping = trainer.train_step(stop)
        profiler.step()
        step, decision = trainer.step, trainer.decided()
        if decision is not None:
            progress.note(decision)
        if step % config.logging.every == 0 or step == steps:
            scalars, speed = trainer.scalars(), throughput.speed()
            if speed.memory is not None and logged >= settled and not measured:
                measured = True
                progress.note(trainer.measured(speed))
            logged = step
            log.write(step, scalars | speed.scalars())
            progress.update(step, scalars["train/loss"], speed)
        if stopping:
            _stop(trainer, progress)
        if _due(step, saved_every(config)) and step < steps:
            with throughput.paused():
                trainer.begin_save()
        for said in trainer.saver.news():
            progress.note(said)
        if _due(step, train.validate_every) and step < steps:
            with throughput.paused():
                validation = trainer.validate(stop)
                if validation is None:
                    _stop(trainer, progress)
                log.write(step, _figures(validation))
                progress.note(f"step {step}: validation {_said(validation)}")
    if steps > first and config.checkpoint.every != "never":
        path = trainer.save()
        for said in (*trainer.saver.news(), f"saved {path}"):
            progress.note(said)


def _stop(trainer: Trainer, progress: ProgressDisplay) -> NoReturn:
    """Leave the run as a signal asked for, with a checkpoint of the latest step; all ranks do so together."""
    stopped, checkpoint = f"stopped by a signal after step {trainer.step} of {trainer.steps}", trainer.config.checkpoint
    if checkpoint.every == "never":
        raise RingflashError(f"{stopped}; checkpoint.every=never: it is not saved")
    trainer.saver.give_up(but=trainer.step)
    path = trainer.save()
    if checkpoint.only_weights:
        raise RingflashError(f"{stopped}; {path} holds its weights alone, which checkpoint.weights starts anew from")
    progress.note(f"stopped by a signal: saved {path}; run_dir={trainer.folder} goes on from there")
    raise RunStoppedError(f"{stopped}; it is saved")


def _run_folder(config: Config) -> Path:
    """The run's folder, made by rank 0, whose clock names it."""
    chosen = config.run_dir or _unused(Path("runs", config.name, time.strftime("%Y-%m-%d_%H-%M-%S")))
    folder = Path(from_rank_0(chosen))

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")

    _by_rank_0(write, folder)
    if config.checkpoint.every != "never":
        _check_shared(folder)
    return folder


def _check_shared(folder: Path) -> None:
    """Raise ArgumentError on all ranks if one does not see what rank 0 writes: each writes its part of a checkpoint."""
    mark = folder / from_rank_0(f".{uuid.uuid4().hex}")
    _by_rank_0(mark.touch, folder)
    seen = from_all(mark.exists())
    if dist.get_rank() == 0:
        mark.unlink()
    if not all(seen):
        raise ArgumentError(
            f"run_dir={folder}: rank {seen.index(False)} does not see what rank 0 writes there; give a folder that all "
            "machines share, or checkpoint.every=never"
        )


def _by_rank_0(write: Callable[[], None], folder: Path) -> None:
    """Let rank 0 write something into the run's folder; where it cannot, all ranks raise ArgumentError."""
    problem = None
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            problem = str(error)
    problem = from_rank_0(problem)
    if problem is not None:
        raise ArgumentError(f"run_dir={folder}: cannot write there: {problem}")


def _unused(folder: Path) -> Path:
    """The folder, or where there is one already, of a run that started in the same second, the first free name."""
    names = itertools.chain([folder.name], (f"{folder.name}-{number}" for number in itertools.count(2)))
    return next(path for path in map(folder.with_name, names) if not path.exists())


def _report(trainer: Trainer, validation: Validation, needles: list[Needle], progress: ProgressDisplay) -> None:
    """Print and keep what the run came to; rank 0 only."""
    corpus = trainer.data.corpus
    others = baselines(corpus) if trainer.config.logging.baselines and corpus is not None else {}
    if validation.bits_per_byte is None:
        progress.note(f"validation: {_said(validation)}")
    else:
        progress.note("validation, bits per byte:")
        for name, bits in {**others, "this model": validation.bits_per_byte}.items():
            progress.note(f"  {name:<12}{bits:.3f}")
    results = {"step": trainer.step, "loss": validation.loss, "bits_per_byte": validation.bits_per_byte}
    results |= {"baselines": others, "loss_by_context": [position._asdict() for position in validation.positions]}
    if needles:
        results["needles"] = [needle._asdict() for needle in needles]
        plot_needles(trainer.folder / "needles.png", needles)
        progress.note(f"needles: {trainer.folder / 'needles.png'}")
    (trainer.folder / "results.json").write_text(json.dumps(results, indent=1))
    if trainer.config.logging.plot:
        scalars = read_scalars(trainer.folder / "metrics.jsonl")
        measured = "loss" if validation.bits_per_byte is None else "bits_per_byte"
        train, valid = (scalars.get(f"{part}/{measured}", []) for part in ("train", "validation"))
        unit = "nats per token" if validation.bits_per_byte is None else "bits per byte"
        plot_run(trainer.folder / "training.png", train, valid, others, validation.positions, trainer.config.name, unit)
        progress.note(f"picture: {trainer.folder / 'training.png'}")


def _figures(validation: Validation) -> dict[str, float]:
    bits = {} if validation.bits_per_byte is None else {"validation/bits_per_byte": validation.bits_per_byte}
    return {"validation/loss": validation.loss, **bits}


def _said(validation: Validation) -> str:
    if validation.bits_per_byte is None:
        return f"{validation.loss:.4f} nats per token"
    return f"{validation.bits_per_byte:.4f} bits per byte"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
