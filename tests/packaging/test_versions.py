"""One pinned version for everything that pyproject.toml asks for."""

from __future__ import annotations

import tomllib

import pytest
from checkout import CHECKOUT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
ASKED = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(name for extra in PROJECT["project"]["optional-dependencies"].values() for name in extra),
]


def pins() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


@pytest.mark.parametrize("requirement", ASKED)
def test_each_requirement_is_pinned_to_a_version_that_it_allows(requirement: str) -> None:
    asked = Requirement(requirement)
    assert asked.specifier.contains(pins()[canonicalize_name(asked.name)])


def test_pins_name_versions_only() -> None:
    text = (CHECKOUT / "constraints.txt").read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.startswith("-")]
    assert not [version for version in pins().values() if "+" in version], "a local build exists on one machine only"
