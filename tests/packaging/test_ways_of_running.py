"""Every way to start Python finds ringflash whole, and Transformers imports beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import CHECKOUT

PROBE = """
import ringflash.kernels.reference, ringflash.parallel.planning.plan, ringflash.launch.plan, ringflash.configs.schema
from transformers import LlamaForCausalLM
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


def run(folder: Path, *arguments: str | Path, path: Path | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_python_c(place: str, tmp_path: Path) -> None:
    run(CHECKOUT if place == "checkout" else tmp_path, "-c", PROBE)


@pytest.mark.parametrize("start", ["pytest", "python -m pytest"])
def test_pytest_started_in_the_checkout(start: str, tmp_path: Path) -> None:
    indented = PROBE.replace("\n", "\n    ")
    (tmp_path / "test_probe.py").write_text(f"def test_probe():{indented}\n")
    command = ["-m", "pytest"] if start == "python -m pytest" else [Path(sys.executable).parent / "pytest"]
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}"]
    assert "1 passed" in run(CHECKOUT, *command, *options, tmp_path)


def test_python_with_a_script_and_with_a_module() -> None:
    assert "who holds what" in run(CHECKOUT, "launch/plan.py")
    assert "who holds what" in run(CHECKOUT, "-m", "ringflash.launch.plan")


def test_torchrun_with_a_script() -> None:
    assert "who holds what" in run(CHECKOUT, *TORCHRUN, "launch/plan.py", "--ranks", "2")


def test_torchrun_with_a_module() -> None:
    assert "who holds what" in run(CHECKOUT, *TORCHRUN, "-m", "ringflash.launch.plan", "--ranks", "2")


def test_another_project_named_kernels_is_not_hidden_by_ours(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    code = "import kernels, ringflash.kernels.reference; print(kernels.__file__)"
    assert run(CHECKOUT, "-c", code, path=tmp_path) == f"{tmp_path}/kernels/__init__.py\n"


@pytest.mark.parametrize("name", ["kernels", "parallel"])
def test_the_linter_refuses_the_top_level_name(name: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "ringflash/example.py", "-"]
    code = f'"""Example."""\n\nimport {name}.plan\n'
    result = subprocess.run(command, cwd=CHECKOUT, input=code, capture_output=True, text=True, timeout=60)
    assert "TID251" in result.stdout
