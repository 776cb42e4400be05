"""Models of an encoder and a decoder: two batches of tokens, and a decoder that attends to the encoder's.

Legend: B sequences; S tokens of one sequence of the decoder and Sk of the encoder, over all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ringflash.errors import ArgumentError
from ringflash.parallel.mesh import Group
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.sharding import Sharding
from ringflash.transformers.documents import Documents

CROSS = "ringflash_cross_attention"
"""Attribute of layers in which a decoder attends to its encoder."""

CROSS_NAME = re.compile(r"cross_attn|cross_attention|encoder_attn|encoder_attention|encdecattention", re.IGNORECASE)
"""How Transformers' models name such layers."""

PACKING = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def mark_cross_attention(model: nn.Module) -> None:
    """Let each layer know whether it attends from a decoder to an encoder."""
    for name, module in model.named_modules():
        if CROSS_NAME.search(name):
            setattr(module, CROSS, True)


def split(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's and the decoder's batch, both by the names of one that is alone.

    Raises:
        ArgumentError: documents are packed, or nothing says what the decoder reads.
    """
    if packed := [name for name in PACKING if batch.get(name) is not None]:
        raise ArgumentError(f"{', '.join(packed)} with an encoder and a decoder; allowed are batches with padding")
    decoder = {name.removeprefix("decoder_"): x for name, x in batch.items() if name.startswith("decoder_")}
    losses = {name: batch[name] for name in ("labels", "num_items_in_batch") if batch.get(name) is not None}
    encoder = {name: x for name, x in batch.items() if not name.startswith("decoder_") and name not in losses}
    if "input_ids" not in decoder and "inputs_embeds" not in decoder:
        shifted_of: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if "labels" not in losses or shifted_of is None:
            raise ArgumentError(f"batch has {sorted(batch)}; decoder_input_ids or labels are missing")
        decoder["input_ids"] = shifted_of(losses["labels"])
    return encoder, decoder | losses


def join(encoder: dict[str, Any], decoder: dict[str, Any], cross: Sharding) -> dict[str, Any]:
    """What the model is called with, from the parts of both batches."""
    both = {name: x for name, x in encoder.items() if name not in ("sharding", "key_padding_mask")}
    for name, x in decoder.items():
        both[name if name in ("labels", "num_items_in_batch", "sharding") else f"decoder_{name}"] = x
    # Models that are given no mask make one of the padding tokens, which the shardings have taken out already.
    for name in ("", "decoder_"):
        both[f"{name}attention_mask"] = torch.ones_like(both[f"{name}position_ids"])
    return both | {"encoder_sharding": encoder["sharding"], "cross_sharding": cross}


def cross_sharding(
    encoder: Sharding, decoder: Sharding, documents: Documents, group: Group, partition: str | Partition | None
) -> Sharding:
    """How queries of the decoder and keys of the encoder lie on the ranks; keys that are padding are seen by nobody."""
    size, queries, keys = decoder.batch, decoder.seqlen, encoder.seqlen
    key_edges = query_edges = None
    if documents.seen is not None:
        first, stop = documents.ends()
        row = torch.arange(size)[:, None]
        key_edges = torch.stack([torch.zeros_like(first), first, stop], 1) + row * keys
        query_edges = torch.tensor([0, 0, queries]) + row * queries
        key_edges = torch.cat([key_edges.flatten(), torch.tensor([size * keys])])
        query_edges = torch.cat([query_edges.flatten(), torch.tensor([size * queries])])
    return Sharding(
        Mask.bidirectional(),
        batch=size,
        seqlen=queries,
        key_seqlen=keys,
        cu_seqlens=key_edges,
        query_cu_seqlens=query_edges,
        group=group,
        partition=partition,
        head_ranks=decoder.head_ranks,
    )


def sharding_of(
    module: nn.Module, causal: bool, sharding: Sharding | None, others: Mapping[str, Any]
) -> Sharding | None:
    """The sharding that a layer attends by: its own argument, or one of those of an encoder and a decoder."""
    if others.get("encoder_sharding") is None:
        return sharding
    if getattr(module, CROSS, False):
        return others["cross_sharding"]
    return sharding if causal else others["encoder_sharding"]
