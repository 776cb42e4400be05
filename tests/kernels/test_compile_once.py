"""Processes that come to a kernel together compile it once, and nobody is held up by a lock that does not work."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from stand_in import stand_in
from triton.runtime.jit import JITFunction

from ringflash.kernels import hopper
from ringflash.kernels.gpu import compile_once
from ringflash.kernels.gpu.row_delta import row_delta
from ringflash.kernels.intervals import causal_intervals

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

RANKS = 4


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of Triton's."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path


@contextmanager
def noted() -> Iterator[list[tuple[str, bool]]]:
    """Names of the kernels that are compiled or loaded, and whether they were found in the cache."""
    found = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda src, cache_hit, **_: found.append((src.name, cache_hit))
        yield found


def delta(dim: int = 64) -> None:
    x = torch.empty(64, 4, dim, dtype=torch.bfloat16)
    row_delta(x, x)


def forward_and_backward() -> None:
    query, key = torch.empty(64, 4, 64, dtype=torch.bfloat16), torch.empty(64, 2, 64, dtype=torch.bfloat16)
    intervals = causal_intervals(64, 64)
    out, lse = hopper.attend(query, key, key, intervals, scale=1.0)
    hopper.attend_backward(out, query, key, key, lse, hopper.row_delta(out, out), intervals, scale=1.0)


def one_rank(folder: str, together, results: multiprocessing.SimpleQueue) -> None:
    """Calls attention at the time that the others do, with nothing compiled, and tells what came of it."""
    triton.knobs.cache.dir = folder
    compile_once.QUIET = 0.0
    sys.stderr = io.StringIO()
    with stand_in(hopper) as driver, noted() as found:
        together.wait()
        forward_and_backward()
    results.put((found, len(driver.launches), sys.stderr.getvalue()))


def test_ranks_that_come_to_kernels_together_compile_each_once_and_one_of_them_says_so(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # imports once for all of them
    context.set_forkserver_preload(["stand_in", "ringflash.kernels.hopper", "ringflash.functional"])
    together, results = context.Barrier(RANKS), context.SimpleQueue()
    ranks = [context.Process(target=one_rank, args=(str(tmp_path), together, results)) for _ in range(RANKS)]
    for rank in ranks:
        rank.start()
    try:
        told = [results.get() for _ in ranks]
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()
    kernels = ["attend_backward_kernel", "attend_kernel", "delta_kernel", "prepare_rows_kernel"]
    compiled = Counter(name for found, _, _ in told for name, hit in found if not hit)
    assert compiled == Counter(kernels)
    for found, launches, _ in told:
        assert sorted(name for name, _ in found) == kernels
        assert launches == len(kernels)
    lines = sorted(line for _, _, text in told for line in text.splitlines() if line.startswith("ringflash: "))
    words = ("attend for head dimension 64, bf16", "attend_backward for head dimension 64, bf16",
             "delta for head dimension 64, bf16", "prepare_rows for fp32")  # fmt: skip
    assert len(lines) == len(words)
    for line, kernel in zip(lines, words, strict=True):
        assert line == f"ringflash: compiling {kernel} (once for this machine; later runs find it in {tmp_path})"


def test_every_kernel_that_is_launched_compiles_once() -> None:
    """Every one is known to Triton after its module was imported; those that others call are no launches."""
    from ringflash.kernels.gpu import elementwise  # noqa: F401  # pyrefly: ignore[unused-import]
    from ringflash.kernels.triton import attend, decode  # noqa: F401  # pyrefly: ignore[unused-import]

    kernels = {
        f"{module}.{name}": x
        for module, found in list(sys.modules.items())
        if module.startswith("ringflash.kernels.")
        for name, x in vars(found).items()
        if name.endswith("_kernel") and isinstance(x, JITFunction)
    }
    assert len({id(x) for x in kernels.values()}) >= 12
    with stand_in() as driver:
        for name, kernel in kernels.items():
            _ = kernel.device_caches[driver.device]
            assert getattr(kernel.compile, "func", None) is compile_once.compile_once, name


def test_different_variants_are_compiled_side_by_side(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in the middle of its compilation for the other to come there too."""
    both = threading.Barrier(2)

    @contextmanager
    def told_of(source: object) -> Iterator[None]:
        both.wait(60)
        yield

    monkeypatch.setattr(compile_once, "told_of", told_of)
    with stand_in(), noted() as found:
        threads = [threading.Thread(target=delta, args=(dim,)) for dim in (64, 128)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not both.broken
    assert found == [("delta_kernel", False)] * 2


def test_what_is_in_the_cache_is_loaded_without_a_lock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in(), noted() as first:
        delta()
    monkeypatch.setattr(compile_once, "locked", mock.Mock(side_effect=AssertionError("a lock was taken")))
    with stand_in(), noted() as second:  # another device, of which this process knows nothing yet
        delta()
    assert (first, second) == ([("delta_kernel", False)], [("delta_kernel", True)])


def hold(path: str, held: Connection) -> None:
    with compile_once.locked(path):
        held.send("held")
        time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[str, multiprocessing.Process]]:
    """A lock and the process that has it and does not get on."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    path = str(tmp_path / "lock")
    process = context.Process(target=hold, args=(path, there))
    process.start()
    assert here.recv() == "held"
    yield path, process
    process.kill()
    process.join()


def test_a_lock_is_free_when_its_holder_dies(holder: tuple[str, multiprocessing.Process]) -> None:
    path, process = holder
    had = threading.Event()

    def take() -> None:
        with compile_once.locked(path):
            had.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    assert not had.wait(0.3)
    os.kill(process.pid, signal.SIGKILL)
    assert had.wait(30)
    waiting.join()


def test_nobody_waits_for_good(holder: tuple[str, multiprocessing.Process], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = holder
    monkeypatch.setattr(compile_once, "LONGEST_WAIT", 0.1)
    begin = time.monotonic()
    with compile_once.locked(path):
        assert time.monotonic() - begin >= 0.1


def test_a_process_forked_under_a_lock_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the open file too, as a duplicate in this process has."""
    path = str(tmp_path / "lock")
    opened, open_file = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(open_file(*arguments)) or opened[-1])
    with compile_once.locked(path):
        copy = os.dup(opened[0])
    other = open_file(path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
    os.close(other)
    os.close(copy)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES])
def test_without_locks_everybody_compiles(cache: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with stand_in() as driver, noted() as found:
        delta()
    assert found == [("delta_kernel", False)]
    assert len(driver.launches) == 1


def test_a_cache_that_is_not_of_files_has_no_lock() -> None:
    with compile_once.locked(None):
        pass


def test_an_error_of_the_compiler_frees_the_lock(cache: Path) -> None:
    broken = mock.patch("triton.compiler.compiler.CompiledKernel", side_effect=RuntimeError("no"))
    with stand_in(), broken, pytest.raises(RuntimeError, match="no"):
        delta()
    assert [x.name for x in cache.glob("*/lock")] == ["lock"]
    with stand_in(), noted() as found:
        delta()
    assert found == [("delta_kernel", True)]  # all but the object was made


SOURCE = SimpleNamespace(name="attend_kernel", signature={"query": "*bf16"}, constants={}, fn=None)


def test_what_is_compiled_is_told_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_once, "QUIET", 0.01)
    with compile_once.told_of(SOURCE):
        give_up = time.monotonic() + 30
        while not caplog.records and time.monotonic() < give_up:
            time.sleep(0.01)
        assert [x.levelname for x in caplog.records] == ["WARNING"]
    assert "compiling attend for bf16" in caplog.text


def test_short_compilations_and_silenced_ones_are_not_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compile_once.told_of(SOURCE):
        pass
    monkeypatch.setattr(compile_once, "QUIET", 0.0)
    with caplog.at_level(logging.ERROR, logger="ringflash.kernels"), compile_once.told_of(SOURCE):
        time.sleep(0.1)
    assert caplog.records == []
