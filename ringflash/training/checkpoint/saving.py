"""Saving a run: each rank writes its pieces, rank 0 makes a checkpoint of them; also while training goes on.

with Saver(folder, device, keep=2) as saver:
    saver.begin(step, engine.pieces(), engine.sizes(), state)  # copies and writes beside the next steps
    ...
    saver.protect()  # ahead of what changes the pieces
    for said in saver.news():
        print(said)
    saver.save(step, engine.pieces(), engine.sizes(), state)  # waits
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ringflash.errors import CheckpointError, RingflashError
from ringflash.training.checkpoint import folders
from ringflash.training.checkpoint.files import Shapes, newest, partial_of, place
from ringflash.training.checkpoint.host_copy import HostCopy
from ringflash.training.checkpoint.meeting import Meeting
from ringflash.training.checkpoint.writing import Blocks, StoppedError, straight, write_pieces
from ringflash.training.engines.base import Piece
from ringflash.training.ranks import from_rank_0


class Saver:
    """Writes the checkpoints of a run into a folder, one at a time.

    All but `news`, `writing` and `protect` is a collective.

    Attributes:
        saved: step and path of the newest checkpoint that it knows of; -1 and None before.
    """

    def __init__(self, root: Path, device: torch.device, keep: int) -> None:
        """Write nothing yet.

        Args:
            root: the folder of all checkpoints, which all ranks see.
            device: where the pieces are.
            keep: newest checkpoints to keep.
        """
        self._root, self._keep = root, keep
        self._copy = HostCopy(device)
        self._beside: _Beside | None = None
        self._stop, self._leave = threading.Event(), threading.Event()
        self._news: list[str] = []
        self.saved: tuple[int, Path | None] = (-1, None)

    def reserve(self, size: int) -> None:
        """Have host memory for a copy of so many bytes, if the host has; without it, `begin` waits for the disk."""
        if not self._copy.reserve(size):
            self._news.append(
                f"WARNING: host memory has no room for a copy of {size / 2**30:.1f} GiB of each rank: training waits "
                "while checkpoints are written"
            )

    def begin(self, step: int, pieces: Iterable[Piece], sizes: Shapes, state: dict[str, Any]) -> None:
        """Have this rank's pieces copied and written while training goes on, which changes them behind `protect`.

        Whether that succeeded is among the `news` later. Waits for the checkpoint before, if that is still written.

        Args:
            step: optimizer steps done; larger than that of any checkpoint there.
            pieces: an engine's `pieces()`, or some of them.
            sizes: shape of each tensor that these are of.
            state: what else is needed to continue; must fit into JSON.
        """
        self.finish()
        began = time.monotonic()
        try:
            job = self._start(step, pieces, sizes, state)
        except CheckpointError as error:
            self._warn(error)
            return
        written = None if self._copy.fill(job.pieces) else self._write(job, straight)
        waited = time.monotonic() - began

        def work() -> tuple[str, str]:
            outcome = self._agree(job, written or self._write(job, self._copy.read))
            took = time.monotonic() - began
            return outcome, f"saved {job.final}: training waited for {waited:.1f} s of {took:.1f} s"

        self._beside = _Beside(job, work)

    def protect(self) -> None:
        """Have the device wait until all is copied that was begun; no collective."""
        self._copy.protect()

    def save(self, step: int, pieces: Iterable[Piece], sizes: Shapes, state: dict[str, Any]) -> Path:
        """Write a checkpoint, unless this step's is there, and wait for it; arguments are those of `begin`.

        Raises:
            CheckpointError: on every rank, if it could not be written; earlier checkpoints are untouched.
        """
        self.finish()
        self.saved = from_rank_0(self.saved)  # another may not have heard of it in time
        if self.saved[0] != step:
            job = self._start(step, pieces, sizes, state)
            self._conclude(job, self._agree(job, self._write(job, straight)))
        path = self.saved[1]
        assert path is not None
        return path

    def give_up(self, but: int) -> None:
        """Stop writing a checkpoint for which there is no time any more, unless it is of this step."""
        if self._beside is not None and self._beside.job.step != but:
            self._stop.set()
            self.finish()

    @property
    def writing(self) -> bool:
        """Whether this rank still writes beside training, or waits for others that do."""
        return self._beside is not None and not self._beside.done()

    def news(self) -> list[str]:
        """What there is to say since the last time: checkpoints that were written beside training, or could not be."""
        if not self.writing:
            self.finish()
        found, self._news = self._news, []
        return found

    def finish(self) -> None:
        """Wait for what is being written; how that went is among the `news`."""
        if self._beside is None:
            return
        beside, self._beside = self._beside, None
        outcome, said = beside.wait()
        given_up = self._stop.is_set()
        self._stop.clear()
        try:
            self._conclude(beside.job, outcome)
            self._news.append(said)
        except CheckpointError as error:
            if not given_up:
                self._warn(error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not isinstance(error, RingflashError):  # which all ranks raise; of others, one is gone
            self._stop.set()
            self._leave.set()
        self.finish()

    def _start(self, step: int, pieces: Iterable[Piece], sizes: Shapes, state: dict[str, Any]) -> _Job:
        """Make the folder."""
        final = self._root / f"step-{step:08d}"
        problem = None
        if dist.get_rank() == 0:
            try:
                folders.begin(final)
            except OSError as error:
                problem = f"{error}; {self._kept()}"
        problem, name = from_rank_0((problem, uuid.uuid4().hex))
        if problem is not None:
            raise CheckpointError(f"{final}: not saved: {problem}")
        return _Job(name, step, final, list(pieces), sizes, json.dumps(state, indent=1).encode())

    def _write(self, job: _Job, blocks: Blocks) -> dict[str, Any]:
        """Write this rank's files; returns what to tell the others of it."""
        folder, rank = partial_of(job.final), dist.get_rank()
        try:
            files = write_pieces(folder, rank, job.pieces, job.sizes, blocks, self._stop.is_set)
            return {"files": files, "elements": _elements({piece.name: (piece.size,) for piece in job.pieces})}
        except StoppedError:
            return {"problem": "given up"}
        except FileNotFoundError as error:  # rank 0 has made the folder
            return {"problem": f"{error}, on rank {rank}; run_dir has to be a folder that all ranks see"}
        except OSError as error:
            return {"problem": str(error)}
        except Exception as error:  # whatever it is, the others have to hear of it
            return {"problem": f"{type(error).__name__}: {error}"}

    def _agree(self, job: _Job, report: dict[str, Any]) -> str:
        """Have rank 0 make a checkpoint of what all ranks have written; what is wrong, or nothing."""
        try:
            outcome = Meeting(job.name, self._leave.is_set).hold(report, lambda reports: self._made(job, reports))
        except RuntimeError as error:  # of the store, which goes with the rank that has it
            outcome = f"{type(error).__name__}: {error}"
        return "nothing was heard of rank 0 in time" if outcome is None else outcome

    def _made(self, job: _Job, reports: list[dict[str, Any] | None]) -> str:
        problem = _problem(job, reports)
        if not problem:
            try:
                files = {name: entry for report in reports if report for name, entry in report["files"].items()}
                folders.commit(job.final, files, _elements(job.sizes), job.state)
                folders.prune(self._root, self._keep)
            except OSError as error:
                problem = str(error)
        if problem:
            folders.give_up(job.final)
            problem = f"{problem}; {self._kept()}"
        return problem

    def _conclude(self, job: _Job, outcome: str) -> None:
        if outcome:
            raise CheckpointError(f"{job.final}: not saved: {outcome}")
        self.saved = job.step, job.final

    def _kept(self) -> str:
        found = newest(self._root)
        return f"the last good one is {found}" if found else "there is no earlier one"

    def _warn(self, error: CheckpointError) -> None:
        self._news.append(f"WARNING: {error}; training goes on")  # a disk can be freed


class _Job(NamedTuple):
    """A checkpoint that is being written."""

    name: str
    step: int
    final: Path
    pieces: list[Piece]
    sizes: Shapes
    state: bytes


class _Beside:
    """A thread that writes a checkpoint; it finds what is wrong, if anything, and what to say if nothing is."""

    def __init__(self, job: _Job, work: Callable[[], tuple[str, str]]) -> None:
        self.job, self._work = job, work
        self._found = "", ""
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._found = self._work()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> tuple[str, str]:
        self._thread.join()
        return self._found


def _problem(job: _Job, reports: list[dict[str, Any] | None]) -> str:
    """Why what the ranks have written is no checkpoint, if it is none."""
    for rank, report in enumerate(reports):
        if report is None:
            return f"nothing was heard of rank {rank} in time; timeout=SECONDS allows more"
        if "problem" in report:
            return report["problem"]
    written: Counter[str] = Counter()
    for report in filter(None, reports):
        written.update(report["elements"])
    if written != _elements(job.sizes):
        return f"the ranks have written {dict(written)} numbers, there are {dict(_elements(job.sizes))}"
    return ""


def _elements(sizes: Shapes) -> Counter[str]:
    """Numbers in each kind of files."""
    found: Counter[str] = Counter()
    for name, shape in sizes.items():
        found[place(name)[0]] += math.prod(shape)
    return found
