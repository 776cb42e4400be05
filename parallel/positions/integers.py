"""Numbers and flags among arguments: Python's, NumPy's, and integers also as tensors of one element."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import torch

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


def check_number(name: str, given: object, instead: str = "") -> None:
    """Raise ArgumentError for what is no number, also for a tensor: it would be waited for, and get no gradient.

    Args:
        name: of the argument.
        given: its value.
        instead: what else is allowed.
    """
    if isinstance(given, torch.Tensor):
        raise ArgumentError(f"{name} is a tensor; allowed are numbers{instead}, there is no gradient by it")
    if not isinstance(given, numbers.Real | torch.SymFloat | torch.SymInt):
        raise ArgumentError(f"{name}={given!r}; allowed are numbers{instead}")


def check_flag(name: str, given: object) -> None:
    """Raise ArgumentError for what is neither true nor false: text would be true, and a tensor be waited for."""
    if given is not None and not isinstance(given, numbers.Integral | np.bool_ | torch.SymBool):
        what = "a tensor" if isinstance(given, torch.Tensor) else repr(given)
        raise ArgumentError(f"{name} is {what}; allowed are True, and False or None")
