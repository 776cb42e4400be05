"""Tests of a file in Triton's interpreter, which is chosen when triton is first imported: in a pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def assert_passes_in_interpreter(file: str) -> None:
    """The tests pass that a file has where `triton.knobs.runtime.interpret` is true; called where it is false."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
