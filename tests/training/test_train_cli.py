"""launch/train.py from its command line: what a run leaves behind, and how it refuses."""

from __future__ import annotations

import json
import math
import os

import pytest
import yaml
from launcher import launch, launch_forked, losses

from ringflash.training.checkpoint.reading import Checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two ranks, and its output."""
    folder = tmp_path_factory.mktemp("cli")
    return folder, launch(folder, 2, "run_dir=run")


def test_a_run_learns_and_leaves_log_checkpoint_results_and_picture(finished):
    folder, result = finished
    assert result.returncode == 0, result.stderr
    run = folder / "run"
    curve = losses(run)
    assert sorted(curve) == list(range(1, 21))
    assert curve[1] == pytest.approx(math.log(512), abs=0.3)
    assert curve[20] < curve[1] - 0.5
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 20
    assert 0 < results["bits_per_byte"] < 8
    assert list(results["baselines"])[:3] == ["unigram", "bigram", "trigram"]
    assert results["loss_by_context"][0]["first"] == 1
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    assert Checkpoint(run / "checkpoints" / "step-00000020").state["step"] == 20
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "smoke"


def test_progress_shows_loss_speed_and_time_and_the_end_compares_with_ngrams(finished):
    _, result = finished
    for said in ("loss", "tokens/s", "s/step", "left", "bits per byte", "trigram", "this model"):
        assert said in result.stdout


def test_nothing_is_written_outside_the_run_and_the_cache(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["run", "runs"]
    assert [path.name for path in (folder / "runs").iterdir()] == ["cache"]


def test_one_process_without_torchrun_goes_on_with_a_run_of_two_ranks(finished, tmp_path):
    folder, _ = finished
    run = folder / "run"
    result = launch(
        tmp_path,
        None,
        "run_dir=longer",
        f"checkpoint.resume={run / 'checkpoints' / 'step-00000020'}",
        f"data.cache_dir={folder / 'runs' / 'cache'}",
        "train.steps=22",
        "engine=zero2",
        "logging=quiet",
    )
    assert result.returncode == 0, result.stderr
    curve = losses(tmp_path / "longer")
    assert sorted(curve) == [21, 22]
    assert curve[21] == pytest.approx(losses(run)[20], abs=0.5)
    assert not (tmp_path / "longer" / "tensorboard").exists()


def test_a_sweep_over_a_handed_over_experiment_is_one_run_after_another(tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nname: mine\ntrain: {steps: 1}\nlogging: {baselines: false}\n"
    )
    flags = ("--multirun", "--config-dir", "conf", "logging=quiet")
    result = launch(tmp_path, None, *flags, "seed=1,2", experiment="mine")
    assert result.returncode == 0, result.stderr
    runs = sorted((tmp_path / "runs/mine").iterdir())
    assert [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs] == [1, 2]
    assert all(sorted(losses(run)) == [1] for run in runs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf", "runs"]


MISTAKES = [
    (["data.path=nowhere"], "DataError: data.path=nowhere: no such file or folder"),
    (["checkpoint.resume=nowhere"], "ArgumentError: checkpoint.resume=nowhere: no such folder"),
    (["+model._target_=os.system"], "ArgumentError: model._target_ is no configuration key"),
    (["model.folder=x"], "ArgumentError: model.folder is no configuration key; allowed here are head_dim"),
    (["model.path=x"], "ArgumentError: model.path=x: no such folder"),
    (["hydra.callbacks.x._target_=os.abort"], "ArgumentError: hydra.callbacks.x._target_ would configure Hydra"),
    (["run_dir=${nowhere}"], "Interpolation key 'nowhere' not found"),
]


def assert_answered_briefly(result, said):
    assert result.returncode not in (None, 0)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 8


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=[overrides[0] for overrides, _ in MISTAKES])
def test_a_mistake_is_answered_in_a_few_lines_that_name_it(tmp_path, overrides, said):
    assert_answered_briefly(launch_forked(tmp_path, None, *overrides), said)


def test_nor_does_a_process_of_its_own_say_more(tmp_path):
    overrides, said = MISTAKES[0]
    assert_answered_briefly(launch(tmp_path, None, *overrides), said)


def test_the_recipe_runs_where_no_optional_library_is_installed(tmp_path):
    absent = ("transformers", "accelerate", "peft", "datasets", "wandb", "trackio")
    (tmp_path / "site").mkdir()
    for name in absent:
        (tmp_path / "site" / f"{name}.py").write_text(f'raise ImportError("{name} is not installed")\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
        result = launch(tmp_path, None, "train.steps=2", "train.validation_sequences=1", "logging.baselines=false")
    assert result.returncode == 0, result.stderr
    assert "bits per byte" in result.stdout
