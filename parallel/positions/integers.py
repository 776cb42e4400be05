"""Integers among arguments, of whichever kind they come: Python's, NumPy's, or tensors of one element."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

from ringflash.errors import ArgumentError


def integers(name: str, given: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """What was given, as Python's integers.

    Raises:
        ArgumentError: something in it is not an integer; a fraction would have to be cut off.
    """
    try:
        return tuple([operator.index(x) for x in given])
    except TypeError as error:
        raise ArgumentError(f"{name}={given}; allowed are integers") from error
