"""The Makefile: which interpreter it takes, when it installs, and what it starts. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import CHECKOUT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout without a virtual environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(CHECKOUT / name, tmp_path / name)
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    surrounding = ("MAKEFLAGS", "MAKELEVEL", "ARGS", "PYTHON", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in surrounding}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )


def pretending(path: Path, version: tuple[int, int, int]) -> Path:
    """An interpreter that says it is another version."""
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    return script(path, f"exec {sys.executable} -c '{code}' \"$@\"")


def installed(folder: Path, gpus: int) -> Path:
    """A checkout whose environment is made of scripts that say what they were asked."""
    script(folder / ".venv/bin/python", f"echo {gpus}")
    script(folder / ".venv/bin/torchrun", 'echo "torchrun $@"; echo "threads $OMP_NUM_THREADS"')
    (folder / ".venv/.installed").touch()
    return folder


def test_an_old_interpreter_is_refused_before_anything_is_made(folder: Path) -> None:
    old = pretending(folder / "python3.9", (3, 9, 18))
    result = make(folder, "train", f"PYTHON={old}")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "3.9.18" in result.stderr
    assert not (folder / ".venv").exists()


def test_a_missing_interpreter_is_named(folder: Path) -> None:
    result = make(folder, "test", "PYTHON=python9.99")
    assert result.returncode != 0
    assert "no python9.99 here" in result.stderr
    assert "no python9.99 here" in make(installed(folder, gpus=0), "test", "PYTHON=python9.99").stderr


def test_an_old_environment_is_refused_whatever_else_is_there(folder: Path) -> None:
    pretending(folder / ".venv/bin/python", (3, 9, 18))
    result = make(folder, "install")
    assert result.returncode != 0
    assert ".venv/bin/python is 3.9.18: make clean" in result.stderr


def test_another_interpreter_than_the_environments_is_refused_even_if_nothing_is_to_be_installed(folder: Path) -> None:
    installed(folder, gpus=0)
    pretending(folder / ".venv/bin/python", (3, 12, 1))
    other = pretending(folder / "other", (3, 13, 0))
    for asked in ({"arguments": [f"PYTHON={other}"]}, {"PYTHON": str(other)}):
        result = make(folder, "install", *asked.pop("arguments", []), **asked)
        assert result.returncode != 0
        assert "other is Python 3.13, and .venv has Python 3.12: make clean first" in result.stderr
    same = pretending(folder / "same", (3, 12, 9))
    assert make(folder, "install", f"PYTHON={same}").returncode == 0
    assert make(folder, "install").returncode == 0  # not asked for any


def test_a_second_make_does_not_install_again_and_a_changed_pin_does(folder: Path) -> None:
    installed(folder, gpus=0)
    assert make(folder, "--question", "install").returncode == 0
    stamp = (folder / ".venv/.installed").stat().st_mtime
    os.utime(folder / "constraints.txt", (stamp + 1, stamp + 1))
    assert make(folder, "--question", "install").returncode == 1


def test_an_environment_whose_interpreter_is_gone_is_made_anew(folder: Path) -> None:
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(folder / "gone")
    result = make(folder, "--dry-run", "install")
    assert result.returncode == 0, result.stderr
    gone = script(folder / "python3.12", 'echo "$@" >> made; exit 1')
    assert make(folder, "install", f"PYTHON={gone}").returncode != 0
    assert (folder / "made").exists()  # the new interpreter was asked, not the link to none


def test_torch_is_installed_first_and_alone_and_everything_under_the_constraints(folder: Path) -> None:
    commands = make(folder, "--dry-run", "install").stdout.splitlines()
    installs = [line.split("pip install ")[1].split() for line in commands if "pip install" in line]
    assert installs[0] == ["--constraint", "constraints.txt", "torch"]
    assert all(command[:2] == ["--constraint", "constraints.txt"] for command in installs)


@pytest.mark.parametrize("name", ["plain", "with a space"])
def test_builds_in_environments_of_their_own_are_under_the_constraints_too(folder: Path, name: str) -> None:
    folder = folder.rename(folder.with_name(name))
    variables = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    script(folder / ".venv/bin/python", f"echo {' '.join(f'{name}=${name}' for name in variables)}")
    shown = make(folder, "install", PIP_CONSTRAINT="another").stdout
    constraints = (folder / "constraints.txt").as_uri()
    expected = " ".join(f"{name}={constraints}" for name in variables)
    assert [line for line in shown.splitlines() if line.startswith("PIP_")].count(expected) >= 2
    assert "another" not in shown


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (4, 4)])
def test_train_starts_one_process_for_each_gpu_and_two_without(folder: Path, gpus: int, processes: int) -> None:
    result = make(installed(folder, gpus), "train", "ARGS=optimizer.lr=1e-3 data.path=corpus")
    assert f"--nproc-per-node={processes} launch/train.py optimizer.lr=1e-3 data.path=corpus\n" in result.stdout


def test_processes_share_the_cores_unless_the_user_says_otherwise(folder: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert f"threads {max(1, cores // 2)}\n" in make(installed(folder, gpus=0), "train").stdout
    assert "threads 7\n" in make(folder, "train", OMP_NUM_THREADS="7").stdout


def test_a_failing_test_run_fails_make(folder: Path) -> None:
    installed(folder, gpus=0)
    script(folder / ".venv/bin/python", "exit 1")
    assert make(folder, "test").returncode != 0


def test_clean_removes_the_environment_and_keeps_runs(folder: Path) -> None:
    installed(folder, gpus=0)
    (folder / "runs/mine").mkdir(parents=True)
    assert make(folder, "clean").returncode == 0
    assert not (folder / ".venv").exists()
    assert (folder / "runs/mine").is_dir()


def test_help_comes_first_and_names_every_target(folder: Path) -> None:
    phony = next(line for line in (folder / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    shown = make(folder).stdout
    assert [target for target in phony.split()[1:] if f"make {target}" not in shown and target != "help"] == []
