"""No configuration runs code: whatever a file or an override says to Hydra itself is refused by its key.

`handed.run` stands for the code. Each way in which hydra.main would come to run it is tried from a file that someone
hands over and from the command line, on launch/train.py's own `main`.
"""

from __future__ import annotations

import pickle
import sys

import pytest
import yaml

from ringflash.errors import ArgumentError
from ringflash.launch import train
from ringflash.training.config.composing import compose

CALL = {"_target_": "handed.run"}
LOGGING = {"version": 1, "root": {"handlers": ["x"]}, "handlers": {"x": {"()": "handed.run"}}}
WAYS = {
    "callbacks": ({"callbacks": {"x": CALL}}, "hydra.callbacks.x._target_"),
    "nested": ({"callbacks": {"x": {"_target_": "builtins.dict", "y": CALL}}}, "hydra.callbacks.x._target_"),
    "list": ({"callbacks": {"x": {"_target_": "builtins.dict", "y": [CALL]}}}, "hydra.callbacks.x._target_"),
    "launcher": ({"launcher": CALL}, "hydra.launcher._target_"),
    "sweeper": ({"sweeper": CALL}, "hydra.sweeper._target_"),
    "job_logging": ({"job_logging": LOGGING}, "hydra.job_logging."),
    "hydra_logging": ({"hydra_logging": LOGGING}, "hydra.hydra_logging."),
    "environment": ({"job": {"env_set": {"CC": "handed"}}}, "hydra.job.env_set.CC"),
}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The module `handed`, and a function that says whether it was imported or called."""
    (tmp_path / "handed.py").write_text("open('imported', 'w')\ndef run(*_, **__): open('ran', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "handed", raising=False)
    yield lambda: [name for name in ("imported", "ran") if (tmp_path / name).exists()]
    sys.modules.pop("handed", None)


def start(monkeypatch, capsys, *arguments):
    """Exit status and standard error of a command line; no step is ever taken."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "train.steps=0"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    return ended.value.code, capsys.readouterr().err


def hand_over(folder, contents):
    """A folder of configuration with an experiment "nice"; returns the arguments that use it."""
    (folder / "conf/experiment").mkdir(parents=True)
    (folder / "conf/experiment/nice.yaml").write_text("# @package _global_\n" + yaml.safe_dump(contents))
    return ["--config-dir", "conf", "experiment=nice"]


def flat(node, key):
    """The same as overrides of single keys; lists stay whole."""
    if isinstance(node, dict) and "()" not in node:
        return [override for name, value in node.items() for override in flat(value, f"{key}.{name}")]
    value = yaml.safe_dump(node, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
    value = value.replace(": ", ":").replace("()", r"\(\)")
    return [f"++{key}={value}"]


@pytest.mark.parametrize("flags", [[], ["--multirun"]], ids=["run", "multirun"])
@pytest.mark.parametrize(("node", "key"), WAYS.values(), ids=WAYS)
def test_a_file_that_names_code_is_refused_by_the_key(ran, tmp_path, monkeypatch, capsys, node, key, flags):
    status, said = start(monkeypatch, capsys, *flags, *hand_over(tmp_path, {"hydra": node}))
    assert ran() == []
    assert status == 1
    assert f"ArgumentError: {key}" in said
    assert "would configure Hydra itself" in said


@pytest.mark.parametrize("flags", [[], ["--multirun"]], ids=["run", "multirun"])
@pytest.mark.parametrize(("node", "key"), WAYS.values(), ids=WAYS)
def test_an_override_that_names_code_is_refused_by_the_key(ran, monkeypatch, capsys, node, key, flags):
    status, said = start(monkeypatch, capsys, *flags, *flat(node, "hydra"))
    assert ran() == []
    assert status == 1
    assert f"ArgumentError: {key}" in said
    assert "would configure Hydra itself" in said


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"]], ids=["cfg", "help"])
@pytest.mark.parametrize("way", ["job_logging", "hydra_logging", "callbacks"])
def test_what_only_shows_a_configuration_refuses_it_too(ran, tmp_path, monkeypatch, capsys, way, flags):
    node, key = WAYS[way]
    status, said = start(monkeypatch, capsys, *flags, *hand_over(tmp_path, {"hydra": node}))
    assert ran() == []
    assert status == 1
    assert f"ArgumentError: {key}" in said


@pytest.mark.parametrize("override", ["hydra.searchpath=[pkg://handed]", "+hydra={searchpath:[pkg://handed]}"])
def test_no_package_is_imported_for_its_files(ran, monkeypatch, capsys, override):
    status, said = start(monkeypatch, capsys, override)
    assert ran() == []
    assert status == 1
    assert "ArgumentError: hydra" in said


def test_a_file_cannot_be_put_where_hydras_own_keys_are(ran, tmp_path, monkeypatch, capsys):
    arguments = hand_over(tmp_path, {})
    (tmp_path / "conf/experiment/nice.yaml").write_text("x: {_target_: handed.run}\n")
    status, said = start(monkeypatch, capsys, *arguments[:2], "+experiment@hydra.callbacks=nice")
    assert ran() == []
    assert status == 1
    assert "ArgumentError: hydra.callbacks.x._target_" in said


def test_no_primary_configuration_is_taken_from_elsewhere(ran, tmp_path, monkeypatch, capsys):
    hand_over(tmp_path, {})
    (tmp_path / "conf/mine.yaml").write_text("hydra: {searchpath: ['pkg://handed']}\n")
    status, _ = start(monkeypatch, capsys, "--config-dir", "conf", "--config-name", "mine")
    assert ran() == []
    assert status != 0


def test_no_pickle_is_loaded(ran, tmp_path, monkeypatch, capsys):
    import handed

    (tmp_path / "imported").unlink()
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(_Reduced(handed.run)))
    status, _ = start(monkeypatch, capsys, "--experimental-rerun", "job.pickle")
    assert ran() == []
    assert status != 0


class _Reduced:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ()


def test_a_folder_of_plain_values_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hand_over(tmp_path, {"defaults": [{"override /model": "mine"}], "train": {"steps": 7}})
    (tmp_path / "conf/model").mkdir()
    (tmp_path / "conf/model/mine.yaml").write_text("hidden_size: 48\n")
    odd = (tmp_path / "conf").rename(tmp_path / "it's [one], {two}")
    config = compose(["experiment=nice"], str(odd))
    assert (config.train.steps, config.model.hidden_size) == (7, 48)
    with pytest.raises(ArgumentError, match="--config-dir=nowhere: no such folder"):
        compose([], "nowhere")
