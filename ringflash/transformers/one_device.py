"""Calls on one device alone: packed documents, padding, and caches that hold earlier tokens.

Legend: B sequences; T queries and S keys of one sequence in this call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.functional import attention
from ringflash.kernels.kept import TensorNotes
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.transformers.masks import Visible
from ringflash.transformers.rows import document_boundaries


def attend_alone(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, features: dict[str, Any], others: dict[str, Any]
) -> Tensor:
    """Attention of this device's queries to its keys, (B, T, H, Dv).

    Args:
        query: (B, T, H, D).
        key: (B, S, Hk, D).
        value: (B, S, Hk, Dv).
        visible: which keys each query sees.
        features: further arguments of `attention`.
        others: keyword arguments of the layer; `cu_seq_lens_q`, `cu_seq_lens_k` and `position_ids` name documents.
    """
    keys, queries, seen = _boundaries(visible, others, (query.shape[0], query.shape[1]))
    if keys is None:
        return attention(query, key, value, mask=visible.mask, group=ONE_DEVICE, **features)[0]
    out, _ = attention(
        *(x.flatten(0, 1)[None] for x in (query, key, value)),
        mask=visible.mask,
        cu_seqlens=keys,
        query_cu_seqlens=None if queries is keys else queries,
        seqlen=query.shape[0] * query.shape[1],
        key_seqlen=key.shape[0] * key.shape[1],
        key_padding_mask=None if seen is None else seen.flatten()[None],
        group=ONE_DEVICE,
        **features,
    )
    return out.view(*query.shape[:3], value.shape[3])


def _boundaries(
    visible: Visible, others: dict[str, Any], sizes: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Boundaries of keys and queries over all sequences laid end to end, and which keys are seen, where it matters."""
    keys = others.get("cu_seq_lens_k")
    if visible.rows is not None:
        if keys is not None:
            raise ArgumentError(
                "cu_seq_lens_k beside an attention_mask that hides tokens, or beside a cache; pass either, or let "
                "SequenceParallel.shard take both into one sharding"
            )
        return visible.rows
    if keys is not None:
        return keys, others.get("cu_seq_lens_q"), None
    if visible.cu_seqlens is not None:
        return visible.cu_seqlens, visible.cu_seqlens, None
    position_ids = others.get("position_ids")
    if visible.holds_earlier or not isinstance(position_ids, Tensor) or position_ids.shape[1:] != sizes[1:]:
        return None, None, None
    found = _restarts(position_ids, sizes[0])
    return found, found, None


_noted: TensorNotes[tuple[int, Tensor | None]] = TensorNotes()
"""Boundaries of position_ids, for so many sequences: all layers of a model are given the same ones."""


def _restarts(position_ids: Tensor, batch: int) -> Tensor | None:
    """Boundaries over B * T tokens where (B or 1, T) position_ids restart; None where they never do."""
    if torch.compiler.is_compiling():  # which must not depend on what they hold
        return document_boundaries(position_ids.diff(dim=1).expand(batch, -1) != 1)
    found = _noted.get(position_ids)
    if found is None or found[0] != batch:
        restarts = position_ids.diff(dim=1).expand(batch, -1) != 1
        found = batch, document_boundaries(restarts) if bool(restarts.any()) else None
        _noted.put(position_ids, found)
    return found[1]
