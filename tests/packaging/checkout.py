"""The checkout under test and its tracked files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[str]:
    """Files under version control that exist, relative to the checkout; without git or a clone the test is skipped."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    if not (CHECKOUT / ".git").exists():
        pytest.skip(f"needs a git clone; {CHECKOUT} is none")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (CHECKOUT / name).is_file()]
