"""Handles: how operators, which take no Python objects, know what a sharding is.

A handle is two numbers in a tensor, for values of tensors do not become compile-time constants: another packing does
not compile anew. The tensor keeps what it stands for alive, wherever it is kept.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.torch_private import without_transforms
from ringflash.parallel.placement import Placement

HELD = "ringflash_placement"
"""Attribute of a handle that keeps alive what it stands for; tensors of traced code have none."""

_numbers = itertools.count(1)
_placements: weakref.WeakValueDictionary[int, Placement] = weakref.WeakValueDictionary()


def new_handle(placement: Placement, index: int) -> Tensor:
    """A handle of one of the masks of a placement."""
    number = next(_numbers)
    _placements[number] = placement
    # Kept for other calls, too: not for as long as one transformation lasts, nor as what autograd must not save.
    with without_transforms(), torch.inference_mode(False):
        handle = torch.tensor([number, index])
    setattr(handle, HELD, placement)  # alive as long as the tensor, whoever keeps it
    return handle


def placement_of(handle: Tensor) -> tuple[Placement, int]:
    """What a handle stands for, and which of its masks.

    Raises:
        ArgumentError: nobody holds the sharding any more.
    """
    number, index = handle.tolist()
    found = _placements.get(number)
    if found is None:
        raise ArgumentError(
            f"sharding: the handle {number} stands for a Sharding that is gone; hold it until the backward pass is done"
        )
    return found, index
