"""Modifiers as launches are given them: what is wrong with them, and what a launch depends on."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.launcher import aligned
from ringflash.kernels.kept import metadata
from ringflash.kernels.modifiers import Modifiers


def modifiers_metadata(modifiers: Modifiers | None) -> tuple | None:
    """All that a launch depends on, beside the tensors' addresses."""
    if modifiers is None:
        return None
    return (modifiers.softcap, modifiers.dropout, modifiers.first_head, *map(metadata, _tensors(modifiers)))


def modifiers_aligned(modifiers: Modifiers | None) -> bool:
    """Whether the tensors are `aligned`."""
    return modifiers is None or aligned(*_tensors(modifiers))


_tensors = attrgetter("slopes", "seed", "query_positions", "key_positions", "key_visible")


def check_modifiers(modifiers: Modifiers, query: Tensor, key: Tensor) -> None:
    """Raise ArgumentError for what the kernels would misread."""
    if not 0.0 <= modifiers.softcap < float("inf"):
        raise ArgumentError(f"softcap={modifiers.softcap}; allowed are 0 for none and positive finite numbers")
    if not 0.0 <= modifiers.dropout < 1.0:
        raise ArgumentError(f"dropout={modifiers.dropout}; allowed is 0 up to, not including, 1")
    placed = modifiers.slopes is not None or bool(modifiers.dropout)
    rows, keys = (query.shape[0],), (key.shape[0],)
    for name, needed, shape, dtype in (
        ("slopes", False, query.shape[:2], torch.float32),
        ("seed", bool(modifiers.dropout), (1,), torch.int64),
        ("query_positions", placed, rows, torch.int32),
        ("key_positions", placed, keys, torch.int32),
        ("key_visible", False, keys, torch.uint8),
    ):
        x = getattr(modifiers, name)
        if x is None and needed:
            raise ArgumentError(f"{name}=None; slopes and dropout need positions, dropout needs a seed")
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != query.device):
            raise ArgumentError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
                f"allowed is {dtype} {tuple(shape)} on {query.device}"
            )
