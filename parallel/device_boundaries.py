"""Document boundaries on a device, where the host must not read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.mask import Mask


def check_on_device(mask: Mask, sizes: Sequence[int], keys: Tensor, queries: Tensor | None) -> None:
    """Raise ArgumentError for what boundaries that the host must not read leave unknown.

    Args:
        mask: rules without documents.
        sizes: batch, query tokens and key tokens of a sequence.
        keys: (documents + 1,) boundaries of the keys.
        queries: those of the queries, or None.
    """
    batch, seqlen, key_seqlen = sizes
    for layout in (mask.layout, mask.routed):
        if layout is not None:  # nobody here knows the lengths of documents; this is the most that they can be
            layout.check_reach("queries", seqlen)
            layout.check_reach("keys", key_seqlen)
    if batch > 1 and (queries is not None or isinstance(mask.prefix, tuple)):
        raise ArgumentError(
            f"cu_seqlens on {keys.device} with a batch of {batch}: pass one packed sequence, or cu_seqlens on the CPU"
        )
    if isinstance(mask.prefix, tuple) and len(mask.prefix) != keys.shape[0] - 1:
        raise ArgumentError(
            f"prefix_lm has {len(mask.prefix)} lengths for {keys.shape[0] - 1} documents; allowed is one length for "
            "all, or one for each document"
        )


def on_a_device(x: Sequence[int] | Tensor | None) -> TypeGuard[Tensor]:
    """Whether these are boundaries that the host must not read."""
    return isinstance(x, Tensor) and x.device.type != "cpu"


def batch_boundaries(keys: Tensor, batch: int, seqlen: int) -> Tensor:
    """Document boundaries on a device that also end where the sequences of a batch do."""
    if batch == 1:
        return keys
    rows = torch.arange(0, batch + 1, device=keys.device) * seqlen
    return torch.cat([keys, rows.clamp_(max=keys[-1])]).sort().values
