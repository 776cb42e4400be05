"""Progress, scalars, loss by position, and the picture."""

import io
import json
import math

import matplotlib.image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ringflash.training.run.plots import plot_run
from ringflash.training.run.position_loss import PositionLoss
from ringflash.training.run.progress import ProgressDisplay
from ringflash.training.run.scalars import ScalarLog, read_scalars
from ringflash.training.run.throughput import Speed

SPEED = Speed(ranks=1, seconds=2.0, tokens_per_second=12345.6, waited=0.25)


def test_scalars_reach_both_logs(tmp_path):
    with ScalarLog(tmp_path) as log:
        log.write(1, {"train/loss": 3.5})
        log.write(2, {"train/loss": math.nan, "validation/loss": 3.0})
    read = read_scalars(tmp_path / "metrics.jsonl")
    assert read["train/loss"][0] == (1, 3.5)
    assert math.isnan(read["train/loss"][1][1])
    assert read["validation/loss"] == [(2, 3.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("validation/loss")] == [(2, 3.0)]
    assert all(json.loads(line)["time"] > 0 for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_other_ranks_write_nothing(tmp_path):
    out = io.StringIO()
    with ScalarLog(tmp_path / "run", rank=1) as log, ProgressDisplay(3, rank=1, console=Console(file=out)) as progress:
        log.write(1, {"loss": 1.0})
        progress.update(1, 1.0, SPEED)
        progress.note("hello")
    assert not (tmp_path / "run").exists()
    assert out.getvalue() == ""


def test_log_of_a_resumed_run_reads_as_one_curve(tmp_path):
    for steps in ((1, 2, 3, 4), (3,)):
        with ScalarLog(tmp_path, tensorboard=False) as log:
            for step in steps:
                log.write(step, {"loss": float(step + 10 * len(steps))})
                log.write(step, {"speed": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "lo')
    read = read_scalars(tmp_path / "metrics.jsonl")
    assert read["loss"] == [(1, 41.0), (2, 42.0), (3, 13.0)]
    assert read["speed"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@given(cut=st.integers(0, 400), zeros=st.integers(0, 3), more=st.integers(1, 3))
def test_a_log_that_a_crash_cut_off_anywhere_is_mended_and_loses_no_later_step(tmp_path_factory, cut, zeros, more):
    folder = tmp_path_factory.mktemp("cut")
    log_file = folder / "metrics.jsonl"
    with ScalarLog(folder, tensorboard=False) as log:
        for step in range(1, 5):
            log.write(step, {"loss": step + 0.5, "né": math.nan})
    whole = log_file.read_bytes()
    left = whole[:cut] + bytes(zeros)  # a file system may keep the length and lose what was written
    log_file.write_bytes(left)
    kept = left.count(b"\n") + (bool(left) and left.endswith(b"}"))
    with ScalarLog(folder, tensorboard=False) as log:
        for step in range(kept + 1, kept + more + 1):
            log.write(step, {"loss": step + 0.5, "né": math.nan})
    assert [json.loads(line)["step"] for line in log_file.read_text().splitlines()] == list(range(1, kept + more + 1))
    assert read_scalars(log_file)["loss"] == [(step, step + 0.5) for step in range(1, kept + more + 1)]


def test_the_end_of_a_log_is_found_behind_long_lines(tmp_path):
    with ScalarLog(tmp_path, tensorboard=False) as log:
        log.write(1, {f"loss/{number}": 1.0 for number in range(1000)})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + whole[:-9])
    with ScalarLog(tmp_path, tensorboard=False) as log:
        log.write(2, {"loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[0] == whole
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def show(steps, terminal=False, every_seconds=10.0, **arguments):
    now, out = [0.0], io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, _environ={})
    with ProgressDisplay(console=console, clock=lambda: now[0], every_seconds=every_seconds, **arguments) as progress:
        for step in steps:
            now[0] += 2.0
            progress.update(step, 2.5, SPEED)
    return out.getvalue()


def test_lines_come_now_and_then_and_at_the_end():
    lines = show(range(1, 21), total_steps=20).splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert lines[1] == "step 6/20  loss 2.5000  12,346 tokens/s  data wait 0.25 s  2.00 s/step  0:28 left"


def test_time_left_counts_from_where_the_run_resumed():
    assert "0:40 left" in show([101], total_steps=121, start_step=100)


def test_terminal_gets_a_bar_with_the_same_figures():
    shown = show(range(1, 4), terminal=True, total_steps=3)
    for part in ("3/3", "loss 2.5000", "12,346 tokens/s", "2.00 s/step", "0:00 left"):
        assert part in shown


def test_disabled_progress_still_prints_notes():
    out = io.StringIO()
    with ProgressDisplay(5, enabled=False, console=Console(file=out)) as progress:
        progress.update(1, 1.0, SPEED)
        progress.note("validation [2.30] bits per byte")
    assert out.getvalue() == "validation [2.30] bits per byte\n"


@given(seqlen=st.integers(1, 300), seed=st.integers(0, 99))
def test_position_bins_hold_every_prediction_once(seqlen, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(seqlen, (3, 50), generator=generator)
    losses = torch.rand(3, 50, generator=generator)
    labels = torch.randint(2, (3, 50), generator=generator) * 101 - 100
    by_position = PositionLoss(seqlen)
    by_position.add(positions, losses, labels)
    bins = by_position.bins()
    assert sum(bin_.tokens for bin_ in bins) == (labels != -100).sum()
    assert sum(bin_.tokens * bin_.loss for bin_ in bins) == pytest.approx(losses[labels != -100].sum().item(), rel=1e-5)
    edges = [edge for bin_ in bins for edge in (bin_.first, bin_.last)]
    assert edges == sorted(edges)
    assert not edges or (edges[0] >= 1 and edges[-1] <= seqlen)
    for bin_ in bins:
        inside = (positions + 1 >= bin_.first) & (positions + 1 <= bin_.last) & (labels != -100)
        assert inside.sum() == bin_.tokens
        assert losses[inside].mean().item() == pytest.approx(bin_.loss, rel=1e-5)


def test_picture_is_written_with_and_without_content(tmp_path):
    by_position = PositionLoss(64)
    by_position.add(torch.arange(64), 4 - torch.arange(64) / 32, torch.ones(64))
    curve = [(step, 8 / step**0.3) for step in range(1, 50)]
    plot_run(tmp_path / "full.png", curve, [(25, 3.0), (49, 2.6)], {"bigram": 3.5}, by_position.bins(), title="run")
    plot_run(tmp_path / "empty.png", [], [], {}, [])
    full, empty = (matplotlib.image.imread(tmp_path / name) for name in ("full.png", "empty.png"))
    assert full.shape == empty.shape
    assert (full != empty).any()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.png", "full.png"]


def test_a_log_on_a_full_disk_is_given_up_and_does_not_stop_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with ScalarLog(tmp_path, tensorboard=False) as log:
        with pytest.warns(UserWarning, match="the log stops at step 1: .*No space left"):
            log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 1.0})
