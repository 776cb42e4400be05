"""Which columns the kernels' blocks have for which head dimensions.

Blocks are as wide as a `Width`, whose columns behind a head's last are zeros that the tensor memory engine fills in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Width:
    """Columns of blocks, in one or two parts (see blocks), of queries and keys and of values and the result."""

    keys: tuple[int, ...]
    values: tuple[int, ...]


WIDTHS = {
    "64": Width((64,), (64,)),
    "128": Width((128,), (128,)),
    "192/128": Width((128, 64), (128,)),
    "192": Width((128, 64), (128, 64)),
    "256": Width((256,), (256,)),
}
"""From the narrowest."""

PADDED_VALUES = ("64", "128")
"""Where values may be narrower than blocks; the others' results go straight between registers and memory at times."""


WIDEST = 512
"""Columns of blocks, and of rows, in kernels of their own; see widest_work."""


def width_of(head_dim: int, value_head_dim: int) -> str | None:
    """The narrowest of `WIDTHS` that holds queries and keys, and values, of these head dimensions; None if none does.

    Example:
        >>> width_of(96, 96), width_of(192, 128), width_of(320, 320)
        ('128', '192/128', None)
    """
    if head_dim % 8 or value_head_dim % 8 or min(head_dim, value_head_dim) < 8:
        return None
    for name, width in WIDTHS.items():
        keys, values = sum(width.keys), sum(width.values)
        fits = value_head_dim <= values if name in PADDED_VALUES else value_head_dim == values
        if head_dim <= keys and fits:
            return name
    return None
