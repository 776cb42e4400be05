"""What a wheel holds, and that it runs where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

from checkout import CHECKOUT, tracked_files

SETUPTOOLS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {folder: package.replace(".", "/") for package, folder in SETUPTOOLS["package-dir"].items()}


def packaged_files() -> dict[str, str]:
    """Tracked modules and YAML files of the packages, with the place of each in the wheel."""
    places = {}
    for name in tracked_files():
        top, *rest = PurePosixPath(name).parts
        if top in FOLDERS and PurePosixPath(name).suffix in (".py", ".yaml"):
            places[name] = "/".join([FOLDERS[top], *rest])
    return places


def run_installed(installed: Path, folder: Path, *command: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_every_tracked_module_and_yaml_file_and_no_others(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == set(packaged_files().values())
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_folder_with_modules_is_a_listed_package() -> None:
    modules = [PurePosixPath(place) for place in packaged_files().values() if place.endswith(".py")]
    assert {".".join(module.parent.parts) for module in modules} == set(SETUPTOOLS["packages"])


def test_folders_that_share_a_name_with_other_projects_are_not_packages() -> None:
    for folder in ("kernels", "parallel"):
        assert not (CHECKOUT / folder / "__init__.py").exists(), f"{folder}/__init__.py would hide Hugging Face's"


def test_every_module_of_the_wheel_imports_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    places = [place for place in packaged_files().values() if place.endswith(".py")]
    modules = [place.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for place in places]
    code = f"import importlib\nfiles = [importlib.import_module(name).__file__ for name in {sorted(modules)}]\n"
    outside = f"print([file for file in files if not file.startswith({str(installed)!r})])"
    assert run_installed(installed, tmp_path, sys.executable, "-c", code + outside) == "[]\n"


def test_the_installed_commands_run(installed: Path, tmp_path: Path) -> None:
    assert "who holds what" in run_installed(installed, tmp_path, installed / "bin/ringflash-plan")
    assert "seqlen: 4096" in run_installed(installed, tmp_path, installed / "bin/ringflash-train", "--cfg", "job")
    assert "--sequence-size" in run_installed(installed, tmp_path, installed / "bin/ringflash-finetune", "--help")
