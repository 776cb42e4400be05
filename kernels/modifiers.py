"""Changes of attention scores and weights that depend on global positions only: softcap, ALiBi, dropout, padding.

Every kernel applies them the same way, in this order, to the scaled score x of query position p and key position s:

    softcap        x = softcap * tanh(x / softcap)                       (Gemma 2, arXiv 2408.00118)
    ALiBi          x = x - slope * |p - s|                               (Press et al., arXiv 2108.12409)
    key_visible    x = -inf where the key is padding
    dropout        weight = 0 or weight / (1 - dropout), after the softmax's sum was taken

Dropout draws from Philox-4x32-10 (Salmon et al., SC 2011), keyed by the seed and counting (key position, query
position, query head, 0): a pair's fate depends on nothing else, so it is the same on one device and on many.

Legend: T query rows, S key rows, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Modifiers:
    """What is done to scores beside the mask; positions are those of the rows of this launch.

    Attributes:
        softcap: bound of the scores; 0 for none.
        slopes: (T, H) fp32 ALiBi slopes, or None. A dimension may have stride 0.
        dropout: probability of dropping a pair; 0 for none.
        seed: (1,) int64 on the tensors' device, for dropout.
        query_positions: (T,) int32 position of each query row among the keys; with slopes or dropout.
        key_positions: (S,) int32 global position of each key row; with slopes or dropout.
        key_visible: (S,) uint8, 0 for keys that nobody may see, or None.
        first_head: number of the first query head among the heads of all ranks, for dropout.
    """

    softcap: float = 0.0
    slopes: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    key_visible: Tensor | None = None
    first_head: int = 0


PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
LOW_32 = 0xFFFFFFFF


def keep_mask(modifiers: Modifiers, heads: int, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
    """Which pairs dropout keeps, (H, rows, keys) bool: the definition that kernels on GPUs follow."""
    assert modifiers.seed is not None  # these three come with dropout
    assert modifiers.query_positions is not None
    assert modifiers.key_positions is not None
    query = modifiers.query_positions[rows].long()[None, :, None]
    key = modifiers.key_positions[keys].long()[None, None, :]
    head = torch.arange(heads, device=query.device)[:, None, None] + modifiers.first_head
    return philox(modifiers.seed, key, query, head) >= dropout_threshold(modifiers.dropout)


def dropout_threshold(dropout: float) -> int:
    """Random words below this number drop their pair."""
    return int(dropout * 2**32)


def philox(seed: Tensor, counter_0: Tensor, counter_1: Tensor, counter_2: Tensor, rounds: int = 10) -> Tensor:
    """First of the four 32-bit words that Philox-4x32 gives for (counter_0, counter_1, counter_2, 0), as int64."""
    c0, c1, c2 = torch.broadcast_tensors(counter_0 & LOW_32, counter_1 & LOW_32, counter_2 & LOW_32)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & LOW_32, (seed >> 32) & LOW_32
    for _ in range(rounds):
        # The product of two 32-bit numbers fills 64 bits; its sign bit is as good as any other here.
        product_0, product_2 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product_2 >> 32) & LOW_32) ^ c1 ^ k0,
            product_2 & LOW_32,
            ((product_0 >> 32) & LOW_32) ^ c3 ^ k1,
            product_0 & LOW_32,
        )
        k0, k1 = (k0 + PHILOX_KEYS[0]) & LOW_32, (k1 + PHILOX_KEYS[1]) & LOW_32
    return c0
