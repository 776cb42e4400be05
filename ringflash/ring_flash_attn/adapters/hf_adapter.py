"""Transformers' models on packed sequences that are cut into one piece for each rank, as ring-flash-attn has them.

    substitute_hf_flash_attn(group, heads_k_stride=1)                    # once
    update_ring_flash_attn_params(cu_seqlens, group)                     # for each batch, the same on all ranks
    out = model(input_ids=input_ids.chunk(ranks, dim=1)[rank], position_ids=position_ids.chunk(ranks, dim=1)[rank])

Every model whose attention is one of FlashAttention's attends over all ranks from then on. Transformers makes such
models only where flash-attn is installed; elsewhere `attn_implementation="llama3_ring"`, which is registered as well,
does the same. A loss over the ranks' pieces, labels among them, is the caller's affair:
`ringflash.transformers.SequenceParallel` takes care of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError, UnsupportedError
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import place_in
from ringflash.ring_flash_attn.arguments import attend, options_of
from ringflash.ring_flash_attn.llama3_flash_attn_varlen import (
    Prepared,
    llama3_flash_attn_prepare_cu_seqlens,
    prepared_of,
)

NAME = "llama3_ring"
"""attn_implementation of models on a machine without flash-attn."""

DATA_PARAMS: dict[str, Any] = {}
"""What `llama3_flash_attn_varlen_func` takes for this batch, by its argument's names."""

_replaced: dict[str, Callable] = {}
"""Transformers' own functions that stand aside, by name."""

_state: dict[str, Any] = {"forward": None, "ring": True}
"""What stands in their place, and whether it is to be used."""


def substitute_hf_flash_attn(process_group: dist.ProcessGroup | None, heads_k_stride: int) -> None:
    """Let models of Transformers attend over the ranks of a group, by its public registry of attention functions.

    Args:
        process_group: whose ranks share a packed sequence; None for the default group.
        heads_k_stride: a positive number; see `llama3_flash_attn_varlen_func`.
    """
    if heads_k_stride < 1:
        raise ArgumentError(f"heads_k_stride={heads_k_stride}; allowed are numbers from 1")
    _state["forward"] = functools.partial(_attend, process_group)
    _replace()


def update_ring_flash_attn_params(cu_seqlens: Tensor, process_group: dist.ProcessGroup | None) -> None:
    """Say where the sequences of the coming batch begin.

    Args:
        cu_seqlens: (sequences + 1,) int32, over the tokens of all ranks; as in `llama3_flash_attn_prepare_cu_seqlens`.
        process_group: as in `substitute_hf_flash_attn`.
    """
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "local_k_slice")
    prepared = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, *place_in(process_group))
    DATA_PARAMS.update(zip(names, prepared, strict=True))
    if _state["forward"] is not None:
        _replace()  # kernels of Transformers' hub are registered with the first model that asks for them


def use_ring_attn(flag: bool) -> None:
    """Whether models attend over all ranks; with False each rank attends alone, by what was replaced."""
    _state["ring"] = flag


def _replace() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    known = AttentionInterface()
    for name in [name for name in known if "flash" in name]:
        if getattr(known[name], "func", None) is not _forward:
            _replaced[name] = known[name]
        AttentionInterface.register(name, functools.partial(_forward, name))
    AttentionInterface.register(NAME, functools.partial(_forward, NAME))
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["flash_attention_2"])


def _forward(name: str, module: torch.nn.Module, *arguments: Any, **settings: Any) -> tuple[Tensor, None]:
    """What Transformers calls: the ring, or the function that was replaced."""
    if _state["ring"]:
        return _state["forward"](module, *arguments, **settings)
    if name not in _replaced:
        raise UnsupportedError(
            f"use_ring_attn(False) with attn_implementation={name!r}, which has replaced nothing; "
            'call model.set_attn_implementation("sdpa") for as long'
        )
    return _replaced[name](module, *arguments, **settings)


def _attend(
    group: dist.ProcessGroup | None,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Query (1, nheads, s, headdim), key and value of this rank's piece; out (1, s, nheads, headdim_v)."""
    try:
        prepared = _checked(group, module, query, key, attention_mask)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        side = -1 if sliding_window is None else sliding_window - 1  # Transformers counts the query itself
        shared = dropout, scaling, causal, (side, side), None, False, False
        options = options_of(shared, softcap or 0.0)
    except Exception as error:
        refuse(group, error)
        raise
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    boundaries = prepared.cu_seqlens
    out, _ = attend(q, k, v, options, group, "contiguous", cu_seqlens=boundaries, sinks=s_aux)
    return out, None


def _checked(
    group: dist.ProcessGroup | None, module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None
) -> Prepared:
    """What the batch was prepared with, after a look at what would give other numbers without an error."""
    if not DATA_PARAMS:
        raise ArgumentError("no boundaries are known: call update_ring_flash_attn_params(cu_seqlens, group) first")
    prepared = prepared_of(DATA_PARAMS["local_k_slice"], group)
    if query.shape[0] != 1:
        raise ArgumentError(f"the batch has {query.shape[0]} rows; allowed is one row of packed sequences")
    if attention_mask is not None:
        raise ArgumentError("attention_mask marks padding; take it out, and give the boundaries of what is left")
    prepared.check_tokens("input_ids", query.shape[2])
    if key.shape[2] != query.shape[2]:
        raise ArgumentError(
            f"keys of {key.shape[2]} tokens and queries of {query.shape[2]}; allowed is self-attention without a "
            "cache: use_cache=False"
        )
    if getattr(getattr(module, "config", None), "attention_chunk_size", None):
        raise ArgumentError("attention in chunks (attention_chunk_size); see ringflash.transformers.SequenceParallel")
    return prepared
