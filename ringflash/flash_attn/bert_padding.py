"""flash-attn's padding: batches without their padding, end to end, and back.

    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, attention_mask)
    out = flash_attn_varlen_func(packed, packed, packed, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    x = pad_input(out, indices, *attention_mask.shape)

Gradients are those of torch's operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringflash.errors import ArgumentError
from ringflash.functional import check_types


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor.

    Args:
        input: (rows, ...).
        indices: (count,) int.

    Returns:
        (count, ...).
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Rows at their places in a tensor of zeros.

    Args:
        values: (count, ...).
        indices: (count,) int, none twice.
        first_axis_dim: rows of the result.

    Returns:
        (first_axis_dim, ...).
    """
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Tokens that a mask keeps, end to end. Waits for a GPU, as their number is the shape of the result.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen) bool or int, 0 for padding.
        unused_mask: (batch, seqlen) bool or int, not 0 for tokens that are kept but not counted as used; None for none.

    Returns:
        The kept tokens (total, ...); their indices (total,) int64 in batch * seqlen; cu_seqlens (batch + 1,) int32, the
        boundaries of what was kept of each sequence; the most that was kept of one; and how many tokens of each
        `attention_mask` keeps, (batch,) int32.

    Raises:
        ArgumentError: a mask is no tensor, or has another shape than the tokens.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> unpad_input(torch.randn(2, 3, 8), mask)[2]
        tensor([0, 2, 3], dtype=torch.int32)
    """
    check_types({"hidden_states": hidden_states, "attention_mask": attention_mask}, {"unused_mask": unused_mask})
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ArgumentError(f"{name} has shape {tuple(mask.shape)}; allowed is {tuple(hidden_states.shape[:2])}")
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()) if len(lengths) else 0,
        used.sum(-1, dtype=torch.int32),
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`; padding is 0.

    Args:
        hidden_states: (total, ...).
        indices: (total,) int, as `unpad_input` gives them.
        batch: sequences.
        seqlen: of each with its padding.

    Returns:
        (batch, seqlen, ...).
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
