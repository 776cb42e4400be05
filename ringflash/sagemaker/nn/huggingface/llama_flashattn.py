"""SageMaker's attention layer for Hugging Face's Llama, `torch.sagemaker.nn.huggingface.llama_flashattn`.

    for layer in model.model.layers:
        replaced = layer.self_attn
        layer.self_attn = LlamaFlashAttention(model.config)
        layer.self_attn.load_state_dict(replaced.state_dict())

Legend: B sequences, s tokens of one sequence on this rank, C hidden size, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ringflash.batches import positions
from ringflash.errors import ArgumentError
from ringflash.functional import check_sharding
from ringflash.kernels.kept import TensorNotes
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import ONE_DEVICE, Group, group_name, group_size
from ringflash.parallel.sharding import Sharding
from ringflash.sagemaker.masks import is_only_causal
from ringflash.sagemaker.nn.attn import FlashGroupedQueryAttention

NOT_ABOUT_ATTENTION = {"cache_position", "num_items_in_batch", "output_hidden_states", "output_router_logits"}
"""What Transformers passes to every layer, and no attention layer looks at."""

_right_positions: TensorNotes[str] = TensorNotes()
"""Position ids that were looked at, and for which sharding or group: every layer is given the same ones."""


class LlamaFlashAttention(nn.Module):
    """`torch.sagemaker.nn.huggingface.llama_flashattn.LlamaFlashAttention`, for Transformers 5.

    It has the parameters of Transformers' `LlamaAttention` by the same names.

    Args:
        config: the model's LlamaConfig.
        layer_idx: place of the layer in the model, for its keys' place in a cache. If None it is found out in the first
            call with a cache, whose layers are filled in order.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded; None is the
            default group. Without the argument a layer attends on its own device, as SageMaker's does.

    Raises:
        ArgumentError: the config is not of a Llama.
    """

    def __init__(self, config: Any, layer_idx: int | None = None, *, group: Group = ONE_DEVICE) -> None:
        super().__init__()
        model_type = getattr(config, "model_type", "llama")
        if model_type != "llama":
            raise ArgumentError(
                f"config has model_type={model_type!r}; allowed is 'llama'. Attention of other models may have "
                "windows, scales or norms that this layer has not"
            )
        if not getattr(config, "is_causal", True):
            raise ArgumentError("config has is_causal=False; allowed is True")
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * self.head_dim
        key_width = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * self.head_dim
        bias = getattr(config, "attention_bias", False)
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.flash_attn = FlashGroupedQueryAttention(getattr(config, "attention_dropout", 0.0), group=group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        sharding: Sharding | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """The layer's output for this rank's tokens.

        Args:
            hidden_states: (B, s, C).
            attention_mask: as `FlashSelfAttention` takes it, and what Transformers makes of (B, s) on one rank; on
                several, bool (B, 1, 1, s) of this rank's keys.
            position_ids: (B, s) or (1, s); on several ranks those of this rank's tokens.
            past_key_values: a cache of Transformers' that grows, as DynamicCache; on several ranks an empty one.
            output_attentions: refused; probabilities are never all there.
            use_cache: says nothing here: a cache is used if there is one.
            position_embeddings: cosine and sine of each token's rotation, (B, s, D) or (1, s, D), made by the model.
            sharding: how the batch lies on its ranks; `model(..., sharding=sharding)` passes it to every layer.
            **others: what else the model passes; refused if attention would have to look at it.

        Returns:
            (B, s, C) and, as Transformers expects it, None in place of probabilities.

        Raises:
            ArgumentError: an argument is not supported; raised before any communication.
            RankMismatchError: ranks disagree on an argument.
        """
        check_sharding(sharding)
        group = self.flash_attn.group
        ranks = group_size(group) if sharding is None else sharding.ranks
        try:
            self._check(output_attentions, others)
            if position_embeddings is None:
                raise ArgumentError("position_embeddings=None; allowed are the cosine and sine that the model makes")
            if ranks > 1:
                _check_positions(position_ids, hidden_states.shape[1], group, sharding)
            attention_mask = _mask(attention_mask, position_ids, ranks, sharding)
            query, key, value = (
                rearrange(project(hidden_states), "b s (h d) -> b h s d", d=self.head_dim)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            cos, sin = (x.unsqueeze(1) for x in position_embeddings)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            if past_key_values is not None:
                key, value = self._cached(past_key_values, key, value, ranks)
        except Exception as error:
            refuse(group if sharding is None else sharding.peers(group), error)
            raise
        out = self.flash_attn(
            query, (key, value), causal=True, layout="b h s d", attn_mask=attention_mask, sharding=sharding
        )
        return self.o_proj(rearrange(out, "b h s d -> b s (h d)")), None

    def _check(self, output_attentions: bool, others: dict[str, Any]) -> None:
        if output_attentions:
            raise ArgumentError("output_attentions=True; probabilities are never all there, allowed is False")
        unknown = sorted(name for name, x in others.items() if x is not None and name not in NOT_ABOUT_ATTENTION)
        if unknown:
            raise ArgumentError(
                f"{', '.join(unknown)}: LlamaFlashAttention does not look at that. Packed documents are said by "
                "sharding=ringflash.Sharding(cu_seqlens=...)"
            )

    def _cached(self, cache: Any, key: Tensor, value: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """All keys and values so far, behind those of earlier calls."""
        if self.layer_idx is None:
            self.layer_idx = _first_empty(cache, key.shape[2])
        earlier = int(cache.get_seq_length(self.layer_idx))
        if earlier and ranks > 1:
            raise ArgumentError(
                f"past_key_values holds {earlier} tokens, on {ranks} ranks; allowed there is an empty one, or None. "
                "Generate with a model whose layers have no group"
            )
        tokens = earlier + key.shape[2]
        key, value = cache.update(key, value, self.layer_idx)
        if key.shape[2] != tokens:
            raise ArgumentError(
                f"past_key_values is a {type(cache).__name__} that gives {key.shape[2]} keys for {tokens} tokens; "
                "allowed is one that grows, as DynamicCache"
            )
        return key, value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (d, d + D/2) of heads (B, H, s, D) by its token's angle, in the dtype that Transformers does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _first_empty(cache: Any, tokens: int) -> int:
    """The first layer of a cache without tokens; those in front of it hold what this call brought them."""
    lengths = [int(cache.get_seq_length(layer)) for layer in range(len(cache))]
    layer = next((number for number, length in enumerate(lengths) if not length), len(lengths))
    if any(length != tokens for length in lengths[:layer]):
        raise ArgumentError(
            f"layer_idx=None, and past_key_values holds {lengths[:layer]} tokens by layer already; begin with an empty "
            "cache, or pass layer_idx"
        )
    return layer


def _mask(mask: Tensor | None, position_ids: Tensor | None, ranks: int, sharding: Sharding | None) -> Tensor | None:
    """The attention mask, without one that Transformers made from this rank's positions alone.

    Those it makes on some ranks only, and attention needs to know on all whether there is one.
    """
    for_each_query = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] > 1
    if not for_each_query or (ranks == 1 and sharding is None):
        return mask
    if is_only_causal(mask, None if sharding is None else position_ids):
        return None
    if ranks > 1:
        raise ArgumentError(
            f"attention_mask is {tuple(mask.shape)} on {ranks} ranks, and cannot say which tokens see each other. Pass "
            "documents as sharding=ringflash.Sharding(cu_seqlens=...), padding as attention_mask of bool "
            f"{(mask.shape[0], 1, 1, mask.shape[3])}, which Transformers leaves as it is"
        )
    return mask


def _check_positions(position_ids: Tensor | None, tokens: int, group: Group, sharding: Sharding | None) -> None:
    """Refuse positions that were counted from 0 on this rank, as Transformers does where it is given none."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    place = group_name(group) if sharding is None else sharding.digest
    if _right_positions.get(position_ids) == place:
        return
    right = positions(tokens * group_size(group), group) if sharding is None else sharding.position_ids
    if right.shape[-1] != tokens:
        return  # the call itself says how many there should be
    counted = torch.arange(tokens)
    if (position_ids.cpu() == counted).all() and not (right == counted).all():
        raise ArgumentError(
            f"position_ids are 0 to {tokens - 1}, as Transformers counts where it is given none; this rank's tokens "
            "stand elsewhere. Pass position_ids=, as ringflash.shard_batch or Sharding.position_ids gives them"
        )
    _right_positions.put(position_ids, place)
