"""Attention probabilities of packed sequences as a dense tensor that also tells which pairs dropout took.

For tests and for looking at small problems: this is the S_dmask of flash-attn's `return_attn_probs`, with memory
quadratic in the sequence length. Nothing here reads boundaries on the host.

Legend: N sequences, T query and S key tokens of all of them end to end, Q and K the most of one sequence, H query
heads, Hk key heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.modifiers import dropout_threshold, philox
from ringflash.parallel.positions.mask import Mask


@torch.no_grad()
def signed_probabilities(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    seed: Tensor,
    query_boundaries: Tensor,
    boundaries: Tensor,
    longest: tuple[int, int],
    *,
    mask: Mask,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout: float,
) -> Tensor:
    """The softmax of every pair before dropout, negative where dropout took it; 0 where the mask hides it.

    Args:
        query: (T, H, D).
        key: (S, Hk, D).
        lse: (H, T) fp32 of the attention.
        seed: (1,) int64, with which it dropped.
        query_boundaries: (N + 1,) int, of the queries.
        boundaries: (N + 1,) int, of the keys.
        longest: (Q, K).
        mask: with bounds to the left and right only.
        scale: factor of the scores.
        softcap: as in `ringflash.functional.attention`; so are the others.
        alibi_slopes: (H,) or (N, H) fp32, or None.
        dropout: probability.

    Returns:
        (N, H, Q, K) in the query's dtype. Pairs behind the ends of a sequence are 0.
    """
    heads, dtype = query.shape[1], query.dtype
    begin, end = query_boundaries.long()[:-1, None], query_boundaries.long()[1:, None]
    key_begin, key_end = boundaries.long()[:-1, None], boundaries.long()[1:, None]
    query_rows = begin + torch.arange(longest[0], device=query.device)
    key_rows = key_begin + torch.arange(longest[1], device=query.device)
    place = query_rows - end + key_end
    distance = place[:, :, None] - key_rows[:, None, :]
    visible = (query_rows < end)[:, :, None] & (key_rows < key_end)[:, None, :]
    if mask.right is not None:
        visible &= distance >= -mask.right
    if mask.left is not None:
        visible &= distance <= mask.left
    if not query.shape[0] or not key.shape[0]:
        return query.new_zeros(len(begin), heads, *longest)
    taken_rows = query_rows.clamp(max=query.shape[0] - 1)
    query_NQHD = query[taken_rows].float()
    key_NKHD = key[key_rows.clamp(max=key.shape[0] - 1)].repeat_interleave(heads // key.shape[1], dim=2).float()
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("nqhd,nkhd->nhqk", query_NQHD, key_NKHD) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * distance[:, None].abs()
    weights = torch.exp(scores - lse[:, taken_rows].transpose(0, 1)[..., None])
    weights = weights.masked_fill(~visible[:, None], 0.0)
    head = torch.arange(heads, device=query.device)[:, None, None]
    words = philox(seed, key_rows[:, None, None, :], place[:, None, :, None], head)
    return torch.where(words >= dropout_threshold(dropout), weights, -weights).to(dtype)
