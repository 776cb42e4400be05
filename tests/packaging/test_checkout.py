"""Tests that need git and a clone say so where there is none."""

from __future__ import annotations

from pathlib import Path

import checkout
import pytest


def test_without_a_clone_the_reason_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkout.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(checkout, "CHECKOUT", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="needs a git clone"):
        checkout.tracked_files()


def test_without_git_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="needs git"):
        checkout.tracked_files()
