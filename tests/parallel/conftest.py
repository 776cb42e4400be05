"""The pool of gloo workers, one for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pools


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """`pool(n).run(function, *args)` runs a module-level function on n gloo ranks and returns their results."""
    with Pools() as pools:
        yield pools
