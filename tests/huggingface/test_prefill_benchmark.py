"""`suite=prefill` from its command line to its files, and the script of first benchmarks, in small form on CPUs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from ringflash.launch import benchmark, benchmark_models, benchmark_prefill
from ringflash.transformers import attention

MODELS = ("Mistral-7B / 16", "Llama-3-8B / 16", "Phi-2 / 16")
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the suite and returns what it printed, the figures, the picture's path and why it failed."""

    def command(*words: str) -> tuple[str, dict, Path, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "suite=prefill", "repeats=1", *words])
        message = ""
        try:
            benchmark.main()
        except SystemExit as exit:
            message = str(exit)
        (path,) = tmp_path.glob("runs/benchmark_prefill/*/prefill.json")
        return capsys.readouterr().out, json.loads(path.read_text()), path.with_suffix(".png"), message

    return command


def test_figures_a_picture_and_the_table_last(run):
    printed, found, picture, message = run("shrink=16", "tokens=8,40")
    assert message == ""
    assert {name: found["machine"][name] for name in ("dtype", "ranks", "shrink")} == {
        "dtype": "float32", "ranks": 1, "shrink": 16,
    }  # fmt: skip
    rows = {(row["model"], row["tokens"], row["implementation"]): row for row in found["rows"]}
    assert set(rows) == {(m, n, i) for m in MODELS for n in (8, 40) for i in ("eager", "sdpa", "ring")}
    for (_, tokens, _), row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(tokens / row["milliseconds"] * 1e3)
        assert row["difference"] < 1e-5
    table = printed.rpartition("\n\n")[2].splitlines()
    assert [line.split("  ")[0] for line in table[1:-1]] == [model for model in MODELS for _ in range(2)]
    assert "divided by 16" in table[-1]
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.01


def test_a_folders_model_is_run_under_its_own_name(run, tmp_path):
    (model,) = (x for x in benchmark_models.models("", 16) if x.name.startswith("Phi"))
    model.build(CPU, torch.float32).save_pretrained(tmp_path / "mine")
    _, found, _, message = run(f"path={tmp_path / 'mine'}", "tokens=8")
    assert message == ""
    assert {row["model"] for row in found["rows"]} == {"mine"}


@pytest.mark.parametrize("wrong", [lambda out: out * 1.01, lambda out: out * float("nan")])
def test_wrong_attention_fails_with_the_difference_of_its_logits(run, monkeypatch, wrong):
    right = attention.attend_alone
    monkeypatch.setattr(attention, "attend_alone", lambda *arguments: wrong(right(*arguments)))
    _, found, _, message = run("shrink=16", "tokens=8", "cases=Llama")
    assert message.strip().startswith('ring, Llama-3-8B / 16, 8 tokens: logits differ from those of "sdpa" by')
    differences = {row["implementation"]: row["difference"] for row in found["rows"]}
    assert not differences["ring"] <= 1e-4
    assert differences["eager"] < 1e-5


@pytest.mark.parametrize("model", benchmark_models.models("", 16), ids=lambda model: model.name)
@pytest.mark.parametrize("implementation", benchmark_prefill.ON_ONE)
def test_the_token_is_that_of_generate(model, implementation):
    built = model.build(CPU, torch.float32)
    built.set_attn_implementation(implementation)
    ids = torch.randint(built.config.vocab_size, (1, 24))
    with torch.no_grad():
        token, _ = benchmark_prefill.next_token(built, input_ids=ids)
    expected = built.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert token == int(expected[0, -1])


def test_public_shapes_have_as_many_weights_as_their_models():
    assert {model.name: model.weights() for model in benchmark_models.models("", 1)} == {
        "Mistral-7B": 7_241_732_096, "Llama-3-8B": 8_030_261_248, "Phi-2": 2_779_683_840,
    }  # fmt: skip


def test_without_room_for_scores_eager_is_left_out_with_its_reason(run, monkeypatch):
    pairs = 2 * 40**2 * 16  # heads and bytes

    def lack_of_memory(needed, device):
        return "64 GiB are needed, and 1 GiB are free" if needed == pairs else None

    monkeypatch.setattr(benchmark_prefill, "lack_of_memory", lack_of_memory)
    printed, found, _, message = run("shrink=16", "tokens=8,40", "cases=Mistral")
    assert message == ""
    assert {(row["implementation"], row["tokens"]) for row in found["rows"] if row["implementation"] == "eager"} == {
        ("eager", 8)
    }
    reason = "for its scores 64 GiB are needed, and 1 GiB are free"
    assert found["skipped"] == [{"implementation": "eager", "case": "Mistral-7B / 16 40", "reason": reason}]
    assert f"eager is left out of Mistral-7B / 16 40: {reason}" in printed


def test_a_model_that_does_not_fit_is_not_built(run, monkeypatch):
    monkeypatch.setattr(benchmark_prefill, "lack_of_memory", lambda needed, device: f"{needed} bytes are needed")
    monkeypatch.setattr(benchmark_models.Model, "build", None)
    printed, found, _, message = run("cases=Phi", "tokens=8")
    assert message == "nothing was measured"
    assert found["skipped"][0]["reason"].startswith(f"for its weights {4 * 2_779_683_840} bytes are needed; shrink=8")
    assert "Phi-2: for its weights" in printed


@pytest.mark.parametrize(
    ("words", "refused"), [(("shrink=5",), "shrink=5: allowed are 1, 2, 4"), (("shrink=8", "path=mine"), "shrink=8: a")]
)
def test_shapes_that_cannot_be_divided_are_refused(words, refused):
    options = benchmark.parse(["suite=prefill", *words])
    with pytest.raises(SystemExit, match=refused):
        list(benchmark_prefill.measure(options))


# Several ranks


def measured(factor_of_rank_1: float) -> tuple[list, list] | None:
    """Rows and what is said to be wrong, None on a rank that reports nothing; rank 1 attends wrong by a factor."""
    import torch.distributed as dist

    right = attention.attention

    def changed(*arguments, **named):
        out, lse = right(*arguments, **named)
        return out * (factor_of_rank_1 if dist.get_rank() == 1 else 1), lse

    attention.attention = changed
    try:
        options = benchmark.parse(["suite=prefill", "shrink=16", "tokens=16,31", "repeats=1"])
        reports = list(benchmark_prefill.measure(options))
    finally:
        attention.attention = right
    return (reports[-1].rows, reports[-1].wrong) if reports else None


def test_two_ranks_share_a_prompt_and_give_the_logits_of_one(pool):
    (rows, wrong), others = pool(2).run(measured, 1.0)
    assert others is None
    assert wrong == []
    shared = {(row.model, row.tokens): row.difference for row in rows if row.implementation == "ring on 2"}
    assert set(shared) == {(model, tokens) for model in MODELS for tokens in (16, 31)}
    assert max(shared.values()) < 1e-5


def test_an_error_on_one_rank_of_two_is_found(pool):
    (_, wrong), _ = pool(2).run(measured, 1.01)
    assert len(wrong) == len(MODELS) * 2
    assert all(line.startswith("ring on 2, ") for line in wrong)


# The script


@pytest.fixture
def first(monkeypatch, capsys):
    """Runs docs/benchmarks/first.py and returns its exit code and what it printed."""
    place = Path(__file__).resolve().parents[2] / "docs/benchmarks/first.py"
    spec = importlib.util.spec_from_file_location("first", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def command(out: Path, *words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["first.py", str(out), *words])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as exit:
            script.main()
        return exit.value.code, capsys.readouterr().out

    return command


NAMES = ("sdpa", "prefill-1", "prefill-2")


def test_the_script_runs_all_in_processes_and_prints_the_tables_last(first, tmp_path):
    sdpa = ["--sdpa", "tokens=16", "cases=full", "repeats=1"]
    prefill = ["--prefill", "shrink=32", "tokens=16", "cases=Phi", "repeats=1"]
    code, printed = first(tmp_path / "out", *sdpa, *prefill, "--limit=90")
    assert code == 0, printed
    figures = {f"{name}.{kind}" for name in NAMES for kind in ("json", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == figures | {"first.log"}
    tables = printed[printed.index("=== sdpa") :]
    assert [line for line in tables.splitlines() if line.startswith("===")] == [f"=== {name}" for name in NAMES]
    assert "full 1 x 16" in tables
    assert "ring on 2" in tables


def test_the_script_cuts_off_what_takes_too_long_and_says_so(first, tmp_path):
    code, printed = first(tmp_path / "out", "--limit=0.5")
    assert code == 1
    assert printed.count("cut off after 0.5 s") == 3
    assert [line for line in printed.splitlines() if line.startswith("===")] == [f"=== {x} FAILED" for x in NAMES]


def test_the_script_writes_over_nothing(first, tmp_path):
    code, _ = first(tmp_path)
    assert str(code).startswith(f"{tmp_path} exists")
