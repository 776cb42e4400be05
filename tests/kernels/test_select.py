"""Which kernels are chosen, and what a forced kernel that cannot run says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from ringflash.errors import ArgumentError
from ringflash.kernels import select as module
from ringflash.kernels.select import name_of, select, select_decoding


def chosen(*arguments: object) -> str:
    return name_of(select(*arguments))


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    """Choices are remembered; those made on a pretended machine must not outlive it."""
    remembered = (module._select, module.select_decoding, module._warn_of_slowness)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of NVIDIA's before Hopper."""
    checks = pytest.importorskip("ringflash.kernels.triton.attend.checks")
    monkeypatch.setattr(checks, "chip_of", lambda device: "ampere")
    hopper = importlib.import_module("ringflash.kernels.hopper")
    monkeypatch.setattr(hopper, "supports", lambda *problem: "it takes compute capability 9.0")


@pytest.mark.parametrize("dtype", module.DTYPES)
def test_cpu_tensors_go_to_torch_operators(dtype: torch.dtype) -> None:
    assert chosen("cpu", dtype, 64) == "blockwise"


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_a_named_kernel_is_taken(name: str) -> None:
    kernels = select(torch.device("cpu"), torch.float32, 20, 36, name)
    assert name_of(kernels) == name
    assert all(callable(getattr(kernels, function)) for function in ("attend", "attend_backward", "row_delta"))


@pytest.mark.usefixtures("on_a_gpu")
def test_gpu_tensors_go_to_triton_where_it_takes_them() -> None:
    assert chosen("cuda", torch.bfloat16, 128) == "triton"
    assert chosen("cuda", torch.bfloat16, 192, 128) == "triton"
    assert chosen("cuda", torch.float64, 128) == "blockwise"
    assert chosen("cuda", torch.bfloat16, 20) == "blockwise"
    assert chosen("cuda", torch.bfloat16, 512) == "triton"
    assert chosen("cuda", torch.bfloat16, 64, 520) == "blockwise"


@pytest.mark.usefixtures("on_a_gpu")
def test_gpu_tensors_go_to_hopper_first(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = pytest.importorskip("ringflash.kernels.hopper.checks")
    monkeypatch.setattr(checks, "runs_on", lambda device, dtype: None)
    monkeypatch.setattr("ringflash.kernels.hopper.supports", checks.supports)
    for dims in (
        (40, 40),
        (64, 64),
        (80, 80),
        (96, 64),
        (128, 128),
        (192, 128),
        (176, 128),
        (192, 192),
        (256, 256),
        (512, 512),
    ):
        assert chosen("cuda", torch.bfloat16, *dims) == "hopper"
        assert chosen("cuda", torch.bfloat16, *dims, "triton") == "triton"
    for dims in ((32, 32), (128, 32), (136, 136), (192, 64), (224, 224), (512, 256), (320, 320)):
        assert chosen("cuda", torch.bfloat16, *dims) == "triton"


@pytest.mark.usefixtures("without_triton")
def test_without_triton_gpu_tensors_go_to_torch_operators() -> None:
    assert chosen("cuda", torch.bfloat16, 128) == "blockwise"


SLOW = "runs as torch operators .* because kernel='triton' cannot run: "


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("dtype", "dims", "reason", "cure"),
    [
        (
            torch.float64,
            (64, 64),
            r"query is torch\.float64",
            r"Give query, key and value as torch\.float32 or torch\.bfl",
        ),
        (torch.float32, (520, 64), "head_dim=520", "Nothing faster takes"),
        (
            torch.bfloat16,
            (20, 36),
            "head_dim=20",
            r"Pad with zeros up to head dimensions \(24, 40\), and pass the scale",
        ),
        (
            torch.float64,
            (20, 64),
            r"query is torch\.float64",
            r"as torch\.float32 .*, and zeros up to head dimensions \(24, 64\)",
        ),
    ],
    ids=["float64", "too_wide", "odd", "odd_float64"],
)
def test_slow_kernels_on_a_gpu_are_warned_of_once_with_reason_and_cure(
    dtype: torch.dtype, dims: tuple[int, int], reason: str, cure: str
) -> None:
    with pytest.warns(UserWarning, match=f"{SLOW}{reason}.*{cure}.*kernel='blockwise' asks for it"):
        assert chosen("cuda", dtype, *dims) == "blockwise"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("cuda:0", dtype, *dims, "auto") == "blockwise"


@pytest.mark.usefixtures("on_a_gpu")
def test_a_dtype_that_would_run_is_named_where_only_it_is_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = pytest.importorskip("ringflash.kernels.triton.attend.checks")
    monkeypatch.setattr(checks, "widest", lambda chip, dtype: 256 if dtype == torch.float32 else 512)
    with pytest.warns(UserWarning, match=rf"{SLOW}head_dim=512.*Give .* as torch\.bfloat16 or torch\.float16;"):
        assert chosen("cuda", torch.float32, 512) == "blockwise"


@pytest.mark.usefixtures("without_triton")
def test_a_gpu_without_triton_warns_to_install_it() -> None:
    with pytest.warns(UserWarning, match=rf"{SLOW}the package triton is not installed\. Install triton"):
        assert chosen("cuda", torch.bfloat16, 128) == "blockwise"


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    "problem",
    [("cuda", torch.bfloat16, 128), ("cuda", torch.bfloat16, 20, 20, "blockwise"), ("cpu", torch.float32, 20)],
    ids=["fast", "asked_for", "cpu"],
)
def test_nobody_is_warned_where_nothing_is_slow_unasked(problem: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(*problem)


@pytest.mark.usefixtures("without_triton")
def test_forced_triton_says_that_the_package_is_missing() -> None:
    with pytest.raises(ArgumentError, match="kernel='triton' cannot run: the package triton is not installed"):
        select("cuda", torch.bfloat16, 128, kernel="triton")


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("dtype", "dims", "missing"),
    [
        (torch.float64, (64, 64), "float64"),
        (torch.float16, (20, 64), "head_dim=20"),
        (torch.float16, (64, 520), "value_head_dim=520"),
    ],
)
def test_forced_triton_names_what_it_does_not_take(dtype: torch.dtype, dims: tuple[int, int], missing: str) -> None:
    with pytest.raises(ArgumentError, match=f"kernel='triton' cannot run: .*{missing}"):
        select("cuda", dtype, *dims, "triton")


@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_forced_gpu_kernels_say_what_they_need(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"kernel='{name}' cannot run: device.*cpu.* GPUs|kernel='{name}' .* CUDA"):
        select("cpu", torch.bfloat16, 128, kernel=name)


CUDA = torch.device("cuda")


def decoding(*problem: object) -> str:
    return select_decoding(*problem).__name__.removeprefix("ringflash.kernels.")


def test_caches_on_the_cpu_are_read_by_torch_operators() -> None:
    assert decoding(torch.device("cpu"), torch.bfloat16, 128, 128) == "cpu.decode"


def test_caches_on_gpus_are_read_by_triton_and_else_a_warning_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("ringflash.kernels.triton.decode.attend_cache")
    monkeypatch.setattr(triton, "chip_of", lambda device: "ampere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoding(CUDA, torch.bfloat16, 128, 512) == "triton.decode"
        assert decoding(CUDA, torch.float32, 256, 8) == "triton.decode"
    slow = "attention to a cache on this GPU runs as torch operators, .*cannot run: "
    for problem, reason in (
        ((torch.float64, 64, 64), "q is torch.float64"),
        ((torch.bfloat16, 20, 64), "headdim=20; they take multiples of 8 up to 512"),
        ((torch.float32, 64, 512), "headdim of v_cache=512; they take multiples of 8 up to 256"),
    ):
        with pytest.warns(UserWarning, match=slow + reason):
            assert decoding(CUDA, *problem) == "cpu.decode"


@pytest.mark.usefixtures("without_triton")
def test_without_triton_caches_on_gpus_are_read_by_torch_operators_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert decoding(CUDA, torch.bfloat16, 128, 128) == "cpu.decode"


def test_unknown_kernels_and_dtypes_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ArgumentError, match="kernel='fast'; allowed are auto, reference, blockwise, triton, hopper"):
        select("cpu", torch.float32, 64, kernel="fast")
    with pytest.raises(ArgumentError, match=r"query is torch\.int64; allowed are torch\.float16"):
        select("cpu", torch.int64, 64)


def test_cpu_machines_import_no_gpu_kernels() -> None:
    program = """
import sys, torch
from ringflash.kernels.select import select
select("cpu", torch.float32, 64)
of_gpus = tuple(f"ringflash.kernels.{name}" for name in ("gpu", "triton", "hopper"))
print([name for name in sys.modules if name.startswith(of_gpus)])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "[]"


@pytest.mark.gpu
def test_the_gpu_at_hand_takes_the_fastest_kernels_that_run_on_it() -> None:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert chosen("cuda", torch.bfloat16, 128) == ("hopper" if hopper else "triton")
    assert chosen("cuda", torch.bfloat16, 192, 128) == ("hopper" if hopper else "triton")
    assert chosen("cuda", torch.float32, 64) == "triton"
