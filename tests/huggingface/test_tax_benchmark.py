"""`suite=tax` from its command line to its files, in small form on gloo ranks."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.nn.parallel import DistributedDataParallel

from ringflash.launch import benchmark, benchmark_tax
from ringflash.launch.benchmark_device import Place


def run(folder: str, *words: str) -> str:
    """The command, with its files under a folder; what it exits with, if it does."""
    sys.argv = ["launch/benchmark.py", "suite=tax", f"out={folder}/tax.json", "shrink=16", "repeats=3", *words]
    try:
        benchmark.main()
    except SystemExit as exit:
        return str(exit)
    return ""


def test_ranks_share_sequences_and_train_as_each_alone_does(pool, tmp_path: Path) -> None:
    """Every way is timed, and its gradients, of as many sequences as there are ranks, are those of none."""
    assert pool(2).run(run, str(tmp_path), "tokens=48,65") == ["", ""]
    found = json.loads((tmp_path / "tax.json").read_text())
    assert {name: found["machine"][name] for name in ("ranks", "dtype", "model")} == {
        "ranks": 2, "dtype": "float32", "model": "small Llama / 16",
    }  # fmt: skip
    assert found["machine"]["transport"] == {"2": "send_recv: tensors are on cpu"}
    names = ("none", "1 rank", "2 ranks, ring", "2 ranks, heads")
    assert [(row["tokens"], row["way"]) for row in found["rows"]] == [(n, name) for n in (48, 65) for name in names]
    none = {row["tokens"]: row["milliseconds"] for row in found["rows"] if row["way"] == "none"}
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["milliseconds"] * 1e3)
        assert row["tax"] == pytest.approx(1 - none[row["tokens"]] / row["milliseconds"])
        assert row["difference"] < 1e-5


def wrappers_left(folder: str) -> int:
    """How many of DDP's there are when the suite is about to leave the process group."""
    right, found = benchmark_tax.joined, []

    @contextmanager
    def counted() -> Generator[Place]:
        with right() as place:
            yield place
            found.append(sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects()))

    benchmark_tax.joined = counted
    gc.disable()  # the suite is not to depend on when it comes by itself
    try:
        run(folder, "tokens=48", "repeats=1")
    finally:
        benchmark_tax.joined = right
        gc.enable()
    return found[0]


def test_the_model_is_gone_before_the_process_group_ends(pool, tmp_path: Path) -> None:
    """Else gloo's group ends in DDP's destructor, which holds the interpreter that gloo's thread may wait for."""
    assert pool(2).run(wrappers_left, str(tmp_path)) == [0, 0]


def run_with_other_sequences(folder: str) -> str:
    """Ways that share sequences are given others than the rest."""
    right = benchmark_tax.Training.batches

    def other(self: benchmark_tax.Training, way: benchmark_tax.Way, *rest: int) -> list[benchmark_tax.Batch]:
        return right(self, way, rest[0], int(way.ranks > 1))

    benchmark_tax.Training.batches = other
    try:
        return run(folder, "tokens=48", "repeats=1")
    finally:
        benchmark_tax.Training.batches = right


def test_a_way_that_trains_on_something_else_fails_the_command(pool, tmp_path: Path) -> None:
    said, _ = pool(2).run(run_with_other_sequences, str(tmp_path))
    ring, heads = said.strip().splitlines()
    assert ring.startswith('2 ranks, ring, 48 tokens: gradients differ from those of "none" by ')
    assert heads.startswith("2 ranks, heads, 48 tokens: ")


def test_every_number_of_ranks_that_divides_the_world_is_timed() -> None:
    assert [way.name for way in benchmark_tax.ways(4, 32)] == [
        "none", "1 rank", "2 ranks, ring", "2 ranks, heads", "4 ranks, ring", "4 ranks, heads",
    ]  # fmt: skip
    assert [way.name for way in benchmark_tax.ways(3, 32)] == ["none", "1 rank", "3 ranks, ring"]


def test_one_process_is_told_to_use_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [])
    assert run(str(tmp_path)).startswith("suite=tax shards sequences over ranks; start it by torchrun")
