"""The pool of gloo workers for the tests of Transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import PRELOAD, Pools

# Seconds for each worker, unless they are there when they are forked.
PRELOAD += ["ringflash.transformers", "trl.trainer.sft_trainer", "peft"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pools]:
    """Workers of each file's own: what trainers keep for their process stays."""
    with Pools() as pools:
        yield pools
