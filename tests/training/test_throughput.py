"""How fast a run is said to be."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_loop import _train

from ringflash.training.estimate.hardware import GIB
from ringflash.training.estimate.operations import Operations
from ringflash.training.run import trainer as trainer_module
from ringflash.training.run.progress import ProgressDisplay
from ringflash.training.run.scalars import read_scalars
from ringflash.training.run.throughput import Speed, Throughput

CPU = torch.device("cpu")


def _speed(operations, peak):
    """Two steps of ten seconds on each of two ranks, with a pause, and behind them one of one second."""
    now, rank = [0.0], dist.get_rank()
    throughput = Throughput(CPU, operations, peak, clock=lambda: now[0])
    for waited in (1.0, 2.0):
        now[0] += 10.0
        throughput.step(1000, pairs=500.0 * (rank + 1), waited=waited * (rank + 1))
        with throughput.paused():
            now[0] += 99.0
    first = throughput.speed()
    now[0] += 1.0
    throughput.step(1000, pairs=0.0, waited=0.0)
    return first, throughput.speed()


def test_ranks_together_have_one_speed_and_a_pause_is_none_of_its_time(pool):
    for first, second in pool(2).run(_speed, Operations(token=6.0, pair=4.0), 100.0):
        assert first.seconds == 10.0
        assert first.tokens_per_second == 100.0
        assert first.each == 50.0
        assert first.waited == 3.0  # of the second rank, a step
        assert first.mfu == pytest.approx((6 * 2000 + 4 * 2 * 1500) / (20 * 2 * 100))
        assert second.tokens_per_second == 1000.0
        assert second.mfu == pytest.approx(6 * 1000 / (2 * 100))
        assert first.memory is None


@pytest.mark.parametrize(("operations", "peak"), [(None, 1e12), (Operations(1.0, 1.0), math.nan)])
def test_of_an_unknown_model_or_card_there_is_no_mfu(pool, operations, peak):
    for speed, _ in pool(1).run(_speed, operations, peak):
        assert speed.mfu is None
        assert "train/mfu" not in speed.scalars()
        assert "MFU" not in str(speed)


@given(
    ranks=st.integers(1, 64),
    seconds=st.floats(0.01, 1e3),
    tokens=st.floats(1, 1e9),
    waited=st.floats(0, 10),
    gpu=st.none() | st.tuples(st.floats(0.001, 1), st.floats(0, 1e12)),
)
def test_logs_and_progress_have_the_same_figures(ranks, seconds, tokens, waited, gpu):
    mfu, memory = (None, None) if gpu is None else gpu
    speed = Speed(ranks, seconds, tokens, waited, mfu, memory)
    scalars, said = speed.scalars(), str(speed)
    assert f"{scalars['train/tokens_per_second']:,.0f} tokens/s" in said
    each = f"{scalars['train/tokens_per_second_per_rank']:,.0f}/{'rank' if gpu is None else 'GPU'}"
    assert (each in said) == (ranks > 1)
    assert f"data wait {scalars['train/data_wait_seconds']:.2f} s" in said
    assert ("train/mfu" in scalars) == ("train/memory_gib" in scalars) == (gpu is not None)
    if gpu is not None:
        assert f"MFU {scalars['train/mfu']:.1%}" in said
        assert f"{scalars['train/memory_gib']:.1f} GiB" in said


def test_progress_shows_the_speed_of_each_gpu_its_mfu_and_memory_and_the_wait_for_data():
    out = io.StringIO()
    with ProgressDisplay(9, console=Console(file=out, width=200, _environ={})) as progress:
        progress.update(3, 2.5, Speed(4, 11.1, 11808.0, 0.02, 0.4512, 60 * GIB))
    shown = "loss 2.5000  11,808 tokens/s  2,952/GPU  MFU 45.1%  60.0 GiB  data wait 0.02 s"
    assert shown in out.getvalue()


def _train_where_the_peak_is_known(folder, peak, *overrides):
    """A run on CPUs that are taken to have a peak; what it was told of each step's pairs."""
    pairs = []

    class Told(Throughput):
        def __init__(self, device, operations, _):
            super().__init__(device, operations, peak)
            pairs.append(operations)

        def step(self, tokens, pairs_, waited):
            super().step(tokens, pairs_, waited)
            pairs.append(pairs_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "Throughput", Told)
        _train(folder, "told", "train.steps=3", "data=bytes", *overrides)
    return pairs


def test_mfu_of_a_run_is_that_of_its_batches_own_documents(pool, tmp_path):
    peak = 1e9
    told = pool(2).run(_train_where_the_peak_is_known, tmp_path, peak, "train.micro_batch=1")
    scalars = read_scalars(tmp_path / "told" / "metrics.jsonl")
    operations = told[0][0]
    for index, step in enumerate((1, 2, 3)):
        pairs = sum(each[1 + index] for each in told)
        assert 0 < pairs <= 2 * 512 * 513 / 2  # two sequences, of documents that end within them
        mfu, seconds = (dict(scalars[f"train/{name}"])[step] for name in ("mfu", "step_seconds"))
        assert mfu == pytest.approx(operations.of(2 * 512, pairs) / (seconds * 2 * peak))
        assert dict(scalars["train/data_wait_seconds"])[step] >= 0
        assert dict(scalars["train/tokens_per_second"])[step] == pytest.approx(2 * 512 / seconds)
