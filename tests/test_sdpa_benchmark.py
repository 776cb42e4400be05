"""`suite=sdpa` from its command line to its files, in small form on a CPU."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ringflash.launch import benchmark, benchmark_sdpa
from ringflash.launch.benchmark_sdpa import EAGER, OURS, TORCH, Case


class CutOffError(Exception):
    pass


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the suite on a few heads and returns what it printed and the JSON file."""

    def command(*words: str, fails: bool = False) -> tuple[str, Path, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(benchmark_sdpa, "HEADS", 2)
        monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "suite=sdpa", "repeats=1", *words])
        message = ""
        if fails:
            with pytest.raises((SystemExit, CutOffError)) as error:
                benchmark.main()
            message = str(error.value)
        else:
            benchmark.main()
        (path,) = tmp_path.glob("**/*.json")
        return capsys.readouterr().out, path, message

    return command


def test_figures_a_picture_and_the_table_last(run, tmp_path):
    printed, path, _ = run("tokens=16,48")
    found = json.loads(path.read_text())
    assert path.parent.parent == tmp_path / "runs" / "benchmark_sdpa"
    assert found["machine"]["dtype"] == "float32"
    assert "fp32 in place of fp16" in printed
    rows = {(row["implementation"], row["case"], row["direction"]): row for row in found["rows"]}
    cases = ["full 1 x 16", "full 1 x 48", "causal 1 x 16", "causal 1 x 48"]
    assert set(rows) == set(itertools.product((EAGER, TORCH, OURS), cases, ("fwd", "fwd+bwd")))
    for (_, case, direction), row in rows.items():
        assert row["milliseconds"] > 0
        assert row["times_eager"] == pytest.approx(rows[EAGER, case, direction]["milliseconds"] / row["milliseconds"])
        assert row["difference"] < 1e-5
    table = printed.rpartition("\n\n")[2].splitlines()
    assert [line.split("  ")[0] for line in table[1:-1]] == [case for case in cases for _ in range(2)]
    assert matplotlib.image.imread(path.with_suffix(".png"))[..., :3].std() > 0.01


def _wrong_out(out, *inputs):
    return out * 1.02


def _no_number(out, *inputs):
    return out * math.nan


def _wrong_gradient(out, query, key, value):
    return out + 0.1 * (query - query.detach())


@pytest.mark.parametrize(
    ("wrong", "directions"),
    [(_wrong_out, ["fwd", "fwd+bwd"]), (_no_number, ["fwd", "fwd+bwd"]), (_wrong_gradient, ["fwd+bwd"])],
)
def test_wrong_attention_is_not_timed_and_fails_with_its_difference(run, monkeypatch, wrong, directions):
    right = benchmark_sdpa.attention

    def attention(*inputs, mask):
        out, lse = right(*inputs, mask=mask)
        return wrong(out, *inputs), lse

    monkeypatch.setattr(benchmark_sdpa, "attention", attention)
    printed, path, message = run("tokens=16", "cases=full", fails=True)
    lines = message.split()
    assert [line.split(" differs")[0] for line in message.strip().splitlines()] == [
        f"ringflash full 1 x 16 {direction}" for direction in directions
    ]
    assert not float(lines[lines.index("by") + 1].rstrip(";")) <= 1e-3
    assert {row["implementation"] for row in json.loads(path.read_text())["rows"]} == {EAGER, TORCH}
    assert "full 1 x 16" in printed.rpartition("\n\n")[2]


def test_a_run_that_is_cut_off_shows_what_it_has(run, monkeypatch):
    right = benchmark_sdpa._measure_case

    def measure_case(case, *arguments):
        if case.tokens == 48:
            raise CutOffError
        right(case, *arguments)

    monkeypatch.setattr(benchmark_sdpa, "_measure_case", measure_case)
    printed, path, _ = run("tokens=16,48", fails=True)
    assert {row["case"] for row in json.loads(path.read_text())["rows"]} == {"full 1 x 16"}
    assert "full 1 x 16" in printed.rpartition("\n\n")[2]
    assert path.with_suffix(".png").exists()


def test_what_does_not_fit_memory_is_left_out_with_its_reason(run, monkeypatch):
    def lack_of_memory(needed, device):
        return (
            "64 GiB are needed, and 1 GiB are free" if needed == Case(False, 1, 48).pairs_bytes(torch.float32) else None
        )

    monkeypatch.setattr(benchmark_sdpa, "lack_of_memory", lack_of_memory)
    printed, path, _ = run("tokens=16,48", "cases=full")
    found = json.loads(path.read_text())
    assert {row["tokens"] for row in found["rows"]} == {16}
    (skipped,) = found["skipped"]
    assert skipped["case"] == "full 1 x 48"
    assert "64 GiB are needed, and 1 GiB are free" in skipped["reason"]
    assert "left out of full 1 x 48" in printed


def test_without_room_for_eager_the_others_have_no_ratio(run, monkeypatch):
    lacks = iter([None, "64 GiB are needed, and 1 GiB are free"])
    monkeypatch.setattr(benchmark_sdpa, "lack_of_memory", lambda needed, device: next(lacks))
    printed, path, _ = run("tokens=16", "cases=full")
    found = json.loads(path.read_text())
    assert {(row["implementation"], row["times_eager"]) for row in found["rows"]} == {(TORCH, None), (OURS, None)}
    assert "eager is left out of full 1 x 16" in printed


def test_gpus_also_run_batches_of_as_many_tokens_at_every_length():
    found = list(benchmark_sdpa.cases((256, 4096), torch.device("cuda")))
    assert [case.name for case in found if not case.causal] == [
        "full 1 x 256", "full 64 x 256", "full 1 x 4096", "full 4 x 4096",
    ]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_eager_attention_is_its_formula(causal):
    query, key, value = torch.randn(3, 2, 3, 7, 8, dtype=torch.float64)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(benchmark_sdpa.eager(query, key, value, hidden), expected)
