"""Long-lived gloo workers for tests: handing a function to a running rank costs a millisecond.

    def ranks_agree(value):                                # a function of a module, so that it pickles by name
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered

    def test_ranks_agree(pool):                            # the fixture of tests/conftest.py
        assert pool(2).run(ranks_agree, 7) == [[7, 7], [7, 7]]

Workers are forked from a server that has imported torch, which takes seconds once and then tenths of a second for a
pool of any size. Every rank has one thread and the default gloo process group. A rank's exception is raised again in
the parent with the traceback of each rank that failed. Nothing waits for ever: after the timeout, or shortly after
another rank has failed, ranks that have not answered are killed with their stacks shown, and the next call starts a
fresh pool.
"""

from __future__ import annotations

import faulthandler
import gc
import glob
import multiprocessing
import multiprocessing.context
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = ["torch._dynamo", "torch.distributed.device_mesh", "ringflash", "hypothesis", "pytest"]
"""Imported once, before workers are forked; torch imports its compiler at the first call of a custom operator."""

MOST_THREADS = 24
"""Of a rank that goes on to the next test: gloo leaves one for each group, which wakes a hundred times a second."""

START_TIMEOUT = 120.0
"""Seconds until every rank has imported torch and joined its group, on a busy machine."""


def server() -> multiprocessing.context.ForkServerContext:
    """Starts processes as forks of one that has imported PRELOAD."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class WorkerError(Exception):
    """A rank died, did not answer in time, or raised something that does not pickle."""


@dataclass(frozen=True)
class Outcome:
    """What one rank answered to one call: a value or an error."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    details: str = ""
    seconds: float = 0.0


class Pool:
    """`size` worker processes joined by gloo; started at the first call and again after a call that broke them."""

    def __init__(
        self,
        size: int,
        timeout: float = 60.0,
        grace: float = 10.0,
        group_timeout: float = 60.0,
        backend: str = "gloo",
        ends_on_error: bool = False,
        one_gpu: bool = False,
    ) -> None:
        """Describe a pool; nothing starts yet.

        Args:
            size: number of ranks.
            timeout: seconds a call may take.
            grace: seconds the other ranks have to answer once one has failed.
            group_timeout: seconds after which the backend itself gives up on a peer.
            backend: of the default process group; one that names nccl gives rank r the CUDA device r.
            ends_on_error: a rank that raises ends behind its answer, as a program does that catches nothing; its peers
                then lose their connections to it.
            one_gpu: all ranks have the first CUDA device, and may share its memory.
        """
        self.size, self.timeout, self.grace = size, timeout, grace
        self.group_timeout, self.backend, self.ends_on_error = group_timeout, backend, ends_on_error
        self.one_gpu = one_gpu
        self._folder: str | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable, *args: Any, timeout: float | None = None, **kwargs: Any) -> list:
        """Call `function(*args, **kwargs)` on every rank and return the results in the order of the ranks."""
        outcomes = self.outcomes(function, *args, timeout=timeout, **kwargs)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if not failed:
            return [outcome.value for outcome in outcomes]
        # A rank that raised by itself says more than one that was left waiting for it.
        failed.sort(key=lambda outcome: (isinstance(outcome.error, WorkerError), outcome.seconds))
        for outcome in failed:
            failed[0].error.add_note(f"--- rank {outcome.rank} of {self.size}:\n{outcome.details}")
        raise failed[0].error

    def outcomes(self, function: Callable, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Outcome]:
        """Like `run`, but hand back each rank's value or error, for tests of failures."""
        call = pickle.dumps((list(sys.path), pickle.dumps((function, args, kwargs))))
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(call)
        outcomes = self._collect(timeout or self.timeout)
        if len({outcome.error is None for outcome in outcomes}) == 2 or any(
            isinstance(outcome.error, WorkerError) for outcome in outcomes
        ):
            self.close()  # ranks stopped at different places: messages may be left between them
        return outcomes

    def close(self) -> None:
        """Stop the workers; a later call starts new ones."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._workers, self._pipes, self._folder = [], [], None

    def crowded(self) -> bool:
        """Whether calls have left so many groups in a rank that a fresh one is cheaper."""
        return any(len(glob.glob(f"/proc/{worker.pid}/task/*")) > MOST_THREADS for worker in self._workers)

    def _start(self) -> None:
        context = server()
        self._folder = tempfile.mkdtemp(prefix="ringflash-pool-")
        for rank in range(self.size):
            pipe, end = context.Pipe()
            settings = self.group_timeout, self.backend, self.ends_on_error, self.one_gpu
            args = (rank, self.size, self._folder, *settings, end)
            worker = context.Process(target=_serve, args=args, daemon=True)
            worker.start()
            end.close()
            self._workers.append(worker)
            self._pipes.append(pipe)
        failed = [outcome for outcome in self._collect(START_TIMEOUT) if outcome.error is not None]
        if failed:
            self.close()
            raise WorkerError(f"rank {failed[0].rank} did not start:\n{failed[0].details}")

    def _collect(self, timeout: float) -> list[Outcome]:
        begin = time.monotonic()
        deadline = begin + timeout
        answers: dict[int, Outcome] = {}
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank, seconds = waiting[pipe], time.monotonic() - begin
                answers[rank] = self._receive(rank, pipe, seconds)
                if answers[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + self.grace)
        seconds = time.monotonic() - begin
        silent = [rank for rank in range(self.size) if rank not in answers]
        for rank in silent:
            error = WorkerError(f"rank {rank} had not answered after {seconds:.1f} s")
            answers[rank] = Outcome(rank, error=error, details=self._stack(rank), seconds=seconds)
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int, pipe: Connection, seconds: float) -> Outcome:
        try:
            value, error, details = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self._workers[rank].join(5)
            error = WorkerError(f"rank {rank} died with exit code {self._workers[rank].exitcode}")
            return Outcome(rank, error=error, details=str(error), seconds=seconds)
        return Outcome(rank, value, error, details, seconds)

    def _stack(self, rank: int) -> str:
        """Where a rank hangs, as written by its signal handler."""
        path = Path(self._folder, f"stack{rank}")
        if not path.exists():
            return "it had not started"
        os.kill(self._workers[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)
        return path.read_text()


class Pools:
    """One `Pool` per number of ranks, made when first asked for: `pools(4).run(...)`."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        return self._pools.setdefault(size, Pool(size))

    def renew(self) -> None:
        """Stop the workers in which earlier calls have left too much; between tests, which all may meet fresh ones."""
        for pool in self._pools.values():
            if pool.crowded():
                pool.close()

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()


def _serve(
    rank: int,
    size: int,
    folder: str,
    group_timeout: float,
    backend: str,
    ends_on_error: bool,
    one_gpu: bool,
    pipe: Connection,
) -> None:
    """Body of a worker: join the group, then answer calls until the parent goes away."""
    gc.freeze()  # half a million objects of imports, which each collection would look through
    with open(Path(folder, f"stack{rank}"), "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if one_gpu:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            torch.cuda.set_device(0)
        elif "nccl" in backend:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=group_timeout),
        )
        dist.barrier()
        pipe.send_bytes(_answer(lambda: None))
        while True:
            try:
                path, call = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            sys.path[:] = path
            answer = _answer(lambda call=call: _call(*pickle.loads(call)))
            pipe.send_bytes(answer)
            if ends_on_error and pickle.loads(answer)[1] is not None:
                os._exit(1)


def _call(function: Callable, args: tuple, kwargs: dict) -> Any:
    return function(*args, **kwargs)


def _answer(call: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((call(), None, ""))
    except BaseException as error:
        details = traceback.format_exc()
        try:
            answer = pickle.dumps((None, error, details))
            pickle.loads(answer)  # exceptions with a constructor of their own pickle but do not come back
        except Exception:
            answer = pickle.dumps((None, WorkerError(f"{type(error).__name__}: {error}"), details))
        return answer
