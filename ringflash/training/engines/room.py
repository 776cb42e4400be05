"""How many weights an engine has in buffers beside its own part of them: as many as the model needs.

DeepSpeed's own numbers are for any model. Its bucket of gradients takes 1 GB in bf16, and under ZeRO 3 the last 10^9
weights of a pass stay gathered for the next one, which is 2 GB in the middle of which attention would have its place.
"""

from __future__ import annotations

BUCKET = 2**25
"""Weights whose gradients are summed together, unless one has more: enough to keep links busy."""


def bucket(largest: int, weights: int) -> int:
    """Weights whose gradients are summed together.

    Args:
        largest: of the weights of a block.
        weights: of the model.
    """
    return min(weights, max(BUCKET, largest))


def gathered(block: int, largest: int) -> int:
    """Weights that are whole on a rank at once: a block's, and those of what comes next.

    Args:
        block: weights of a block.
        largest: of all weights, such as the output head.
    """
    return block + max(block, largest)
