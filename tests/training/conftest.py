"""The pool of gloo workers, shared with the tests of parallel/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "parallel"))

from pool import PRELOAD, Pools

PRELOAD += ["ringflash.transformers", "peft", "datasets"]  # seconds for each worker, unless it is there by then


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """`pool(n).run(function, *args)` runs a module-level function on n gloo ranks and returns their results."""
    with Pools() as pools:
        yield pools
