"""The pool of gloo workers, shared with the tests of parallel/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "parallel"))

from pool import PRELOAD, Pools

# Seconds for each worker, unless they are there when they are forked.
PRELOAD += ["ringflash.transformers", "trl.trainer.sft_trainer", "peft"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pools]:
    """As of parallel/, with workers of each file's own: groups that trainers make stay, with their threads."""
    with Pools() as pools:
        yield pools
