"""What of a Hugging Face batch a rank of a group holds: tokens, labels, and by what its loss is divided.

Legend: B sequences; S tokens of one sequence over all ranks, s of them on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.labels import IGNORED_LABEL, as_int64, check_labels
from ringflash.parallel.sharding import Sharding
from ringflash.transformers.documents import Documents
from ringflash.transformers.models import BEFORE_FIRST

DOCUMENT_KEYS = ("attention_mask", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keys of a batch that the sharding stands for once it is made."""

LOSS_KEYS = ("labels", "shift_labels", "num_items_in_batch")

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""

WEIGHT = 0x1E3779B97F4A7C15
"""An odd number whose multiples have bits everywhere (Steele et al., doi 10.1145/2660193.2660195)."""


def sizes_of(batch: Mapping[str, Any]) -> tuple[int, int]:
    """B and S, of a batch of tensors; only boundaries of documents may be lists."""
    for name, x in batch.items():
        if name not in DOCUMENT_KEYS and isinstance(x, list | tuple | np.ndarray):
            raise ArgumentError(f"{name} is {type(x).__name__}; allowed is a tensor (batch, seqlen), as collators make")
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        x = batch.get(name)
        if x is not None:
            if not isinstance(x, Tensor) or x.dim() != dims:
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentError(f"{name} is {shape}; allowed is a tensor (batch, seqlen{', hidden' * (dims > 2)})")
            if 0 in x.shape[:2]:
                raise ArgumentError(f"{name} is {tuple(x.shape)}; allowed are batches with tokens")
            return x.shape[0], x.shape[1]
    raise ArgumentError(f"batch has {sorted(batch)}; input_ids or inputs_embeds is missing")


def shard_tokens(batch: Mapping[str, Any], position_ids: Tensor, sharding: Sharding) -> dict[str, Any]:
    """This rank's part of everything that goes by tokens, but for labels."""
    part: dict[str, Any] = {"position_ids": sharding.shard(position_ids, -1)}
    whole = sharding.batch, sharding.seqlen
    for name, x in batch.items():
        if name in DOCUMENT_KEYS or name in LOSS_KEYS or name in part:
            continue
        if isinstance(x, Tensor) and x.dim() > 0:
            if tuple(x.shape[:2]) != whole:
                raise ArgumentError(
                    f"{name} is {tuple(x.shape)}; allowed are tensors of {whole}, (batch, seqlen, ...). What is no "
                    "token, as pixel_values are, goes into inputs_embeds first"
                )
            x = sharding.shard(x, 1)
        part[name] = x
    return part


def shard_targets(
    batch: Mapping[str, Any], documents: Documents, sharding: Sharding, predicts_next: bool
) -> dict[str, Any]:
    """This rank's labels, and by what its loss is to be divided, for the mean over ranks to be that of the batch.

    Args:
        batch: whole.
        documents: its documents and padding.
        sharding: how it lies on its ranks.
        predicts_next: labels are those of the tokens themselves, and a token predicts the next one's.
    """
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    name, given = ("labels", labels) if shifted is None else ("shift_labels", shifted)
    if given is None:
        return {}
    if tuple(given.shape) != (sharding.batch, sharding.seqlen):
        raise ArgumentError(
            f"{name} is {tuple(given.shape)}; allowed is {(sharding.batch, sharding.seqlen)}, (batch, seqlen)"
        )
    given = as_int64(name, given)
    check_labels(name, given)
    hidden = None if documents.seen is None else ~documents.seen.to(given.device) & (given != IGNORED_LABEL)
    if name == "labels" and hidden is not None and bool(hidden.any()):
        raise ArgumentError(
            f"labels has {int(hidden.sum())} targets at tokens that attention_mask hides; set them to "
            f"{IGNORED_LABEL}, as data collators do"
        )
    shift = shifted is None and predicts_next
    whole = sharding.shifted_labels(given) if shift else given
    items = batch.get("num_items_in_batch")
    items = (whole != IGNORED_LABEL).sum().clamp(min=1) if items is None else items
    if sharding.ranks > 1:
        items = float(items) / sharding.ranks  # no tensor: FSDP's mixed precision would round one to bf16
    part = {"labels": sharding.shard(given, 1), "num_items_in_batch": items}
    return part | {"shift_labels": sharding.shard(whole, 1)} if predicts_next or shifted is not None else part


def position_ids_of(batch: Mapping[str, Any], of_padding: int | None = None) -> Tensor:
    """Positions of all tokens, (B or 1, S) or with a dimension in front: those given, or as the model counts them.

    Args:
        batch: whole.
        of_padding: see `position_of_padding`.
    """
    given = batch.get("position_ids")
    if given is not None:
        return given
    ids = batch.get("input_ids")
    x = batch["inputs_embeds"] if ids is None else ids
    if of_padding is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    counted = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    if of_padding == BEFORE_FIRST and batch.get("attention_mask") is not None:
        counted = batch["attention_mask"].to(counted)
    elif of_padding != BEFORE_FIRST and ids is not None:
        counted = (ids != of_padding).to(counted)
    return counted.cumsum(1) * counted + of_padding


def fingerprints(batch: Mapping[str, Any]) -> dict[str, str]:
    """What tells entries of a batch, in order of their names, from another one's; a device is asked for all at once."""
    found = {name: repr(x)[:100] for name, x in batch.items() if not isinstance(x, Tensor)}
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    for device in {x.device for x in tensors.values()}:
        there = {name: x for name, x in tensors.items() if x.device == device}
        numbers = torch.stack([_number(x.detach().flatten()) for x in there.values()]).tolist()
        found |= {
            name: f"{x.dtype} {tuple(x.shape)} {number % 2**64:x}"
            for (name, x), number in zip(there.items(), numbers, strict=True)
        }
    return dict(sorted(found.items()))


def _number(x: Tensor) -> Tensor:
    """Of integers (n,) a sum with weights that look drawn, modulo 2**64; of floats, which are more, one of bits."""
    if x.is_floating_point():
        return x.contiguous().view(BITS[x.element_size()]).sum(dtype=torch.int64)
    weights = torch.arange(1, len(x) + 1, device=x.device) * WEIGHT
    weights = (weights ^ weights >> 29).mul_(WEIGHT) | 1  # odd: no change of one number is lost
    return (x.long() * weights).sum()
