"""Scalars of a run, for programs and for TensorBoard.

    with ScalarLog(folder, rank) as log:
        log.write(step, {"train/loss": loss, "train/tokens_per_second": speed})

Ranks other than 0 may make the same calls; they write nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringflash.training.run.trackers import Trackers


class ScalarLog:
    """Scalars as lines of JSON in `metrics.jsonl`, and for TensorBoard in `tensorboard/`.

    Args:
        folder: the run's folder; an existing log is continued, behind its last whole line.
        rank: only rank 0 writes.
        tensorboard: whether to write for TensorBoard too.
        trackers: what else is told of scalars.
        start_step: last step that an earlier part of the run is kept of.
    """

    def __init__(
        self,
        folder: str | Path,
        rank: int = 0,
        tensorboard: bool = True,
        start_step: int = 0,
        trackers: Trackers | None = None,
    ) -> None:
        self._lines = self._board = None
        self._trackers = trackers
        if rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "metrics.jsonl").open("a")
        _mend_end(folder / "metrics.jsonl")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, and not always wanted

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log some scalars of one step; what is not finite becomes null in the JSON.

        A log that cannot be written, on a full disk say, is given up with a warning; training goes on.
        """
        try:
            if self._lines is not None:
                finite = {name: float(value) if math.isfinite(value) else None for name, value in scalars.items()}
                self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
                self._lines.flush()
            if self._board is not None:
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, step)
            if self._trackers is not None:
                self._trackers.log(step, scalars)
        except OSError as error:
            warnings.warn(f"the log stops at step {step}: {error}", stacklevel=2)
            self.close()

    def close(self) -> None:
        """Write out what is buffered, as far as that is possible."""
        if self._trackers is not None:
            self._trackers.finish()
            self._trackers = None
        for sink in (self._lines, self._board):
            if sink is not None:
                with contextlib.suppress(OSError):
                    sink.close()
        self._lines = self._board = None

    def __enter__(self) -> ScalarLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _mend_end(path: Path) -> None:
    """End a log with a whole line: what a crash left of one would swallow the next."""
    with path.open("r+b") as file:
        end, left = os.fstat(file.fileno()).st_size, b""
        while end and b"\n" not in left:
            begin = max(0, end - 4096)
            file.seek(begin)
            left, end = file.read(end - begin) + left, begin
        left = left[left.rfind(b"\n") + 1 :]
        if not left:
            return
        try:
            json.loads(left)  # no beginning of an object is JSON: only its line end is missing
        except ValueError:
            file.seek(-len(left), os.SEEK_END)
            file.truncate()
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def read_scalars(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), ...]} of a metrics.jsonl, null as nan.

    Where a resumed run went back to an earlier step, what was logged from that step on before is left out. A last line
    that was cut off by a crash is left out too.
    """
    entries: list[dict[str, Any]] = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        while entries and entries[-1]["step"] > entry["step"]:
            entries.pop()
        entries.append(entry)
    scalars: dict[str, dict[int, float]] = {}
    for entry in entries:
        for name in entry.keys() - {"step", "time"}:
            scalars.setdefault(name, {})[entry["step"]] = math.nan if entry[name] is None else entry[name]
    return {name: sorted(values.items()) for name, values in scalars.items()}
