"""The doctor sees what is there, tries the ring, and says what to change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkout import CHECKOUT

from ringflash.configs.schema import Config, entries
from ringflash.launch import doctor


def advice_of(look, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report = doctor.Report()
    look(report)
    return "\n".join(report.advice)


def test_the_screen_names_kernels_and_the_ring_runs() -> None:
    command = [sys.executable, "launch/doctor.py"]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) <= 40, "one screen"
    assert torch.__version__ in result.stdout
    assert "right on 2 processes" in result.stdout
    kernel = "triton" if torch.cuda.is_available() else "blockwise"
    assert f"{kernel} for head dimension 64, 128, 256" in result.stdout


def test_without_its_packages_it_says_how_to_install_them(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-E", "launch/doctor.py"]  # -S leaves site-packages out
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "torch is not installed" in result.stderr
    assert "make doctor" in result.stderr


def test_more_threads_than_cores_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OMP_NUM_THREADS=9999 is more than" in advice_of(doctor.look_at_host, monkeypatch, OMP_NUM_THREADS="9999")
    assert "more than" not in advice_of(doctor.look_at_host, monkeypatch, OMP_NUM_THREADS="1")


def test_little_memory_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (2**30, 2**31))
    assert "4 GiB of memory" in advice_of(doctor.look_at_host, monkeypatch)


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "C compiler" in advice_of(doctor.look_at_versions, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays a machine whose torch cannot use its GPU")
def test_a_driver_without_a_torch_that_can_use_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advice_of(doctor.look_at_gpus, monkeypatch) == ""
    monkeypatch.setattr(doctor, "query_driver", lambda: "580.95.05")
    assert "580.95.05" in advice_of(doctor.look_at_gpus, monkeypatch)


@pytest.mark.parametrize(("major", "advised"), [(7, True), (8, False)])
def test_a_gpu_without_bfloat16_is_advised_a_precision_that_exists(
    monkeypatch: pytest.MonkeyPatch, major: int, advised: bool
) -> None:
    gpu = SimpleNamespace(name="some GPU", major=major, minor=5)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": gpu,
        "get_device_name": gpu.name,
        "mem_get_info": (2**34, 2**34),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    advice = advice_of(doctor.look_at_gpus, monkeypatch)
    assert ("engine.precision=fp32" in advice) == advised
    bounds = {key: bounds for key, _, bounds in entries(Config())}
    assert "fp32" in bounds["engine.precision"]["choices"]


def test_links_are_read_from_the_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tSYS\t0-31\nGPU1\tNV18\t X \tSYS\t0-31\nNIC0\tSYS\tSYS\t X\n"
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=shown))
    assert doctor.link_kinds() == {"NV18"}


def test_a_ring_that_fails_is_reported_as_broken() -> None:
    report = doctor.Report()
    doctor.try_ring(report, "no_such_backend", 1)
    assert "failed" in report.broken[0]
    assert dict(report.rows)["ring, no_such_backend"].startswith("FAILED")


@pytest.mark.gpu
def test_gpus_and_driver_are_shown() -> None:
    report = doctor.Report()
    doctor.look_at_gpus(report)
    rows = dict(report.rows)
    assert torch.cuda.get_device_name(0) in rows["GPU 0"]
    assert rows["driver"] != "unknown"
