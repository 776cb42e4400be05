"""What a model's own mask creation says, as rules of positions in place of a tensor of pairs.

Transformers calls the mask function of an attention implementation once for each kind of layer and hands what it
returns to every layer of that kind. It must be a tensor of four dimensions: `generate` makes masks ahead of the model
where a cache is static, and hands them to compiled code. So where sequences begin and end stands in the tensor; the
rules stand beside it, as an attribute, and are compared with what each layer says of itself.

Legend: B sequences; T queries and S keys of one sequence in this call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.sharding import Sharding
from ringflash.transformers.at_work import at_work
from ringflash.transformers.rows import Rows, document_boundaries, rows_of

VISIBLE = "ringflash_visible"
"""Attribute of a mask that holds its `Visible`; in compiled code there is none."""


@dataclass(frozen=True)
class Visible:
    """Which keys each query of a call sees.

    Attributes:
        mask: rules of positions.
        holds_earlier: keys may be there that are not this call's tokens, of a cache.
        rows: where the tokens of each sequence begin and end; None where all are there.
        cu_seqlens: boundaries of packed documents over the B * T tokens laid end to end; None without any.
        sharding: how the batch lies on its ranks; None where it is not sharded.
    """

    mask: Mask
    holds_earlier: bool = False
    rows: Rows | None = None
    cu_seqlens: Tensor | None = None
    sharding: Sharding | None = None


def ring_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor:
    """The mask function "ring"; arguments are those of Transformers' `AttentionMaskInterface`.

    Returns:
        (1, 1, 1, n) int64: `Rows.tensor`, or n = 0 where there are no rows to tell.

    Raises:
        ArgumentError: the model adds rules of its own, as for the tokens of images.
    """
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":
        raise ArgumentError(
            f"{type(config).__name__}: the model adds a mask of its own to the usual rules (as for tokens of images "
            'that see each other), which attn_implementation="ring" cannot read; use "sdpa" for such inputs'
        )
    bidirectional = "allow_is_bidirectional_skip" in others
    size = local_size or None  # 0: some models make a mask for windows that none of their layers has
    chunked = size is not None and not bidirectional and _is_chunk(config, size)
    mask = _rules(not bidirectional, None if chunked else size, size if chunked else None)
    if attention_mask is not None and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        attention_mask = None
    counted_there = isinstance(q_offset, Tensor)  # by a static cache, on the device
    behind = not bidirectional and (counted_there or kv_offset + kv_length != q_offset + q_length)
    rows = None
    if behind or attention_mask is not None or (chunked and kv_offset):
        sides = (q_length, q_offset), (kv_length, kv_offset)
        anywhere = bidirectional and size is None
        rows = rows_of(batch_size, *sides, attention_mask, size if chunked else None, anywhere, device)
    found = torch.empty(1, 1, 1, 0, dtype=torch.int64, device=device) if rows is None else rows.tensor()
    if not torch.compiler.is_compiling():
        holds_earlier = counted_there or q_offset > 0 or (kv_length != q_length and not bidirectional)
        packed = None if rows else _packed(mask_function)
        setattr(found, VISIBLE, Visible(mask, holds_earlier, rows, packed, at_work.sharding))
    return found


def visible_of(
    module: nn.Module, mask: Tensor | None, sizes: tuple[int, int, int], is_causal: bool | None, window: int | None
) -> Visible:
    """What a layer sees.

    Args:
        module: the layer.
        mask: what `ring_mask` returned; None for layers of models that make no mask.
        sizes: B, T and S.
        is_causal: see `layer_rules`.
        window: see `layer_rules`.

    Raises:
        ArgumentError: the mask is another one, or says something else than the layer.
    """
    rules = layer_rules(module, is_causal, window)
    batch, queries, keys = sizes
    longer = keys != queries and rules.right == 0  # in cross attention they are other tokens
    if mask is None:
        return Visible(rules, longer)
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.shape[:3] != (1, 1, 1):
        shape = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(
            f"attention_mask is {shape} in {type(module).__name__}; allowed are None, and a mask (batch, tokens) of 0 "
            "and 1 that is passed to the model"
        )
    found = None if torch.compiler.is_compiling() else getattr(mask, VISIBLE, None)
    if found is None:
        return Visible(rules, longer, Rows.of_tensor(mask, batch, keys) if mask.numel() else None)
    if found.mask != rules:
        raise ArgumentError(
            f"{type(module).__name__} says of itself that it sees {rules}, and its model made a mask for {found.mask}; "
            'attn_implementation="ring" does not know which is right, use "sdpa" for this model'
        )
    return found


def layer_rules(module: nn.Module, is_causal: bool | None, sliding_window: int | None) -> Mask:
    """Rules of a layer, as it says them itself.

    Args:
        module: the layer.
        is_causal: its attribute of that name if None.
        sliding_window: keys that a query sees, with its own; None for all.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    config, number = (getattr(module, name, None) for name in ("config", "layer_idx"))
    types = getattr(config, "layer_types", None)
    if config is not None and types is not None and number is not None and types[number] == "chunked_attention":
        return _rules(causal, chunk=config.attention_chunk_size)
    if sliding_window is not None and not causal:  # layers hand on the configuration's number, or one more
        sliding_window = getattr(config, "sliding_window", None) or sliding_window - 1
    return _rules(causal, sliding_window)


def layer_masks(config: Any, causal: bool) -> dict[Mask, int]:
    """Which keys a query may see, and how many layers have each such mask, as a configuration says."""
    types = getattr(config, "layer_types", None)
    if types is None:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if windowed else "full_attention"] * getattr(config, "num_hidden_layers", 1)
    masks: dict[Mask, int] = {}
    for kind in types:
        window = config.sliding_window if kind == "sliding_attention" else None
        mask = _rules(causal, window, config.attention_chunk_size if kind == "chunked_attention" else None)
        masks[mask] = masks.get(mask, 0) + 1
    return masks or {_rules(causal): 1}


def _rules(causal: bool, window: int | None = None, chunk: int | None = None) -> Mask:
    """Rules in Transformers' words.

    Args:
        causal: a query sees no later key.
        window: keys that a query sees, with its own; where it sees later ones too, those beside it to each side.
        chunk: size of chunks.
    """
    mask = Mask.causal() if causal else Mask.bidirectional()
    if chunk is not None:
        mask = mask & Mask.chunked(chunk)
    if window is None:
        return mask
    return mask & (Mask.sliding_window(window - 1) if causal else Mask.sliding_window(window, window))


def _is_chunk(config: Any, size: int) -> bool:
    """Whether a local layer of this size has chunks, and no window: Transformers tells the size, and not of what."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if size == window == chunk:
        raise ArgumentError(
            f"{type(config).__name__} has sliding_window={window} and attention_chunk_size={chunk}, and a layer of "
            f"{size} tokens may be either; set the one that the model does not use to None"
        )
    return size == chunk


def _packed(mask_function: Callable | None) -> Tensor | None:
    """Boundaries of the documents that Transformers found in position_ids which restart.

    They stand only in the closure of its mask function. Compiled code has none to look into: there the attention
    function takes them from position_ids.
    """
    if torch.compiler.is_compiling() or mask_function is None:
        return None
    for function in _parts(mask_function):
        if function.__name__ == "inner_mask" and "packed_sequence_mask" in function.__code__.co_freevars:
            return document_boundaries(_closure(function)["packed_sequence_mask"].diff(dim=1) != 0)
    return None


def _parts(function: Callable) -> list[Callable]:
    parts = _closure(function).get("mask_functions", ())
    return [part for each in parts for part in _parts(each)] or [function]


def _closure(function: Callable) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return dict(zip(names, (cell.cell_contents for cell in getattr(function, "__closure__", None) or ()), strict=True))
