"""The attention function "ring": what every attention layer of a Transformers model calls.

A batch that `SequenceParallel.shard` sharded brings its `sharding` among the keyword arguments of each layer, and
attention is over all ranks. A call without one is for this device alone: while evaluating, while generating, or where
there is one rank only. On several ranks such a call is an error unless it says so, by `alone`.

Legend: B sequences; T queries and S keys of one sequence in this call; H query heads, Hk key heads, D head dimension,
Dv the value's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringflash.errors import ArgumentError
from ringflash.functional import attention
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.sharding import Sharding
from ringflash.transformers.at_work import at_work
from ringflash.transformers.encoder_decoder import sharding_of
from ringflash.transformers.masks import Visible, visible_of
from ringflash.transformers.one_device import attend_alone

NOT_READ = ("position_bias", "indices", "block_indices", "head_mask", "sinks", "output_attentions")
"""Keyword arguments by which some models change scores, choose keys, or ask for probabilities, which are never made."""


def ring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sharding: Sharding | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function "ring"; arguments are those of Transformers' `AttentionInterface`.

    Args:
        module: the layer, which says whether it is causal where the call does not.
        query: (B, H, T, D).
        key: (B, Hk, S, D).
        value: (B, Hk, S, Dv).
        attention_mask: what `ring_mask` returned; None for layers of models that make no mask.
        scaling: factor of the scores; 1 / sqrt(D) if None.
        dropout: probability of dropping a pair.
        sliding_window: keys that a query sees, with its own.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: (H,) sink logits.
        is_causal: the module's attribute of that name if None.
        sharding: how the batch lies on its ranks; and where it was made for `Mask.shared_prefix`, which keys each
            token sees.
        others: read are `cu_seq_lens_q`, `cu_seq_lens_k` and `position_ids`; `key_padding_mask`; and the further
            shardings of models with an encoder and a decoder, `encoder_sharding` and `cross_sharding`.

    Returns:
        (B, T, H, Dv), and None for the probabilities.

    Raises:
        ArgumentError: a batch on several ranks was not sharded, or something cannot be honoured.
    """
    _check_readable(module, others)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    visible = visible_of(
        module, attention_mask, (query.shape[0], query.shape[1], key.shape[1]), is_causal, sliding_window
    )
    features = {
        "scale": scaling,
        "dropout": dropout,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.to(query.dtype),
    }
    sharding = sharding_of(module, visible.mask.right == 0, sharding, others)
    if sharding is None:
        sharding = visible.sharding  # of layers that hand no keyword arguments on
    if sharding is None:
        _check_alone(module)
        return attend_alone(query, key, value, visible, features, others), None
    _check_sharded(module, visible, sharding)
    if (places := others.get("row_positions")) is not None:
        query = _with_temperature(module, query, places)
    out, _ = attention(
        query,
        key,
        value,
        mask=_behind_shared_prompts(visible.mask, sharding),
        sharding=sharding,
        group=ONE_DEVICE if sharding.ranks == 1 else None,
        key_padding_mask=others.get("key_padding_mask"),
        **features,
    )
    return out, None


def _behind_shared_prompts(rules: Mask, sharding: Sharding) -> Mask:
    """What a layer sees of a batch whose answers share prompts: where they lie is the sharding's to say."""
    first = sharding.masks[0]
    if first.branches is None:
        return rules
    return first if rules == Mask.causal() else rules & first


def _check_readable(module: nn.Module, others: dict[str, Any]) -> None:
    given = [name for name in NOT_READ if others.get(name) is not None and others[name] is not False]
    if given:
        raise ArgumentError(
            f'{type(module).__name__} passes {", ".join(given)} to attention, which attn_implementation="ring" does '
            'not know; use "sdpa" or "eager" for this model'
        )


def _with_temperature(module: Any, query: Tensor, places: Tensor) -> Tensor:
    """Queries (B, T, H, D) of Llama 4's layers without rotary embedding, scaled by their places in the whole sequence.

    Those layers make queries longer with their place in the row, which on this rank they counted from its first token.

    Args:
        module: the layer.
        query: scaled by the places 0 to T - 1.
        places: (T,) or (B, T), their places.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    counted = torch.arange(places.shape[-1], device=places.device)
    true, wrong = (
        torch.log1p(torch.floor((x.float() + 1) / module.floor_scale)) * module.attn_scale + 1
        for x in (places, counted)
    )
    return (query * (true / wrong)[..., None, None]).to(query.dtype)


def _check_alone(module: nn.Module) -> None:
    if at_work.sharding is not None:
        raise ArgumentError(
            f"{type(module).__name__} is given neither the sharding of its batch nor a mask: the model hands no "
            "keyword arguments on to its layers, so that its batches cannot be sharded"
        )
    if at_work.alone == 0 and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ArgumentError(
            f"{type(module).__name__} on {dist.get_world_size()} ranks has a batch that was not sharded: call "
            "model(**sequence.shard(batch)) with sequence = ringflash.transformers.SequenceParallel(model, group), or "
            "work inside `with sequence.alone():` where every rank has sequences of its own, as to evaluate or generate"
        )


def _check_sharded(module: nn.Module, visible: Visible, sharding: Sharding) -> None:
    if sharding.ranks > 1 and visible.holds_earlier:
        raise ArgumentError(
            f"{type(module).__name__} has a cache that holds tokens, or a static one, which is not sharded: pass "
            "use_cache=False, or work inside `with sequence.alone():`"
        )
    if visible.rows is not None:
        raise ArgumentError(
            "attention_mask beside sharding; pass it to SequenceParallel.shard, which takes it into the sharding"
        )
