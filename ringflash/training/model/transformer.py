"""A Llama-style decoder whose attention spans the ranks that share a sequence.

RMSNorm, rotary embedding, grouped-query attention, SwiGLU; tied or untied head (Touvron et al., arXiv 2302.13971;
Llama 3, arXiv 2407.21783). A rank holds its own tokens of each sequence; only attention looks at other ranks' tokens,
and the rotary embedding takes global positions, so the model computes the same function on any number of ranks.

By hand, as the reference that is read, and runs, without Transformers; it computes what Transformers' Llama computes.
All other models come from there (`model.pretrained`).

Weights keep the dtype they have (fp32, or bf16 under DeepSpeed) and are cast to the dtype of the activations where
they are used. There are no buffers: what is computed from the configuration stays fp32 whatever the engine casts.

Legend: B sequences, T this rank's tokens of a sequence, C hidden size, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringflash import DistributedFlashAttention, Mask, Sharding, shard_batch
from ringflash.configs.schema import AttentionConfig, ModelConfig
from ringflash.kernels.torch_private import has_gradient_hooks, has_hooks
from ringflash.loss import cross_entropy, cross_entropy_sum
from ringflash.parallel.execution.query_rounds import RoundAttention
from ringflash.parallel.planning.query_rounds import size_of_rounds
from ringflash.parallel.positions.balance import token_work
from ringflash.training.memory.blocks import BlockMemory
from ringflash.training.memory.by_rows import Parts
from ringflash.training.memory.rows import TILE_ELEMENTS, rms_norm, rotate, swiglu
from ringflash.training.model.decoder import Decoder
from ringflash.training.model.rope import rotary
from ringflash.training.model.shape import check_shape, elements_again, head_dim, query_width


class Linear(nn.Module):
    """Matrix product without bias, in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32, then scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention over the whole sequence, of which this rank holds a part."""

    def __init__(self, config: ModelConfig, attend: DistributedFlashAttention) -> None:
        super().__init__()
        self.head_dim = head_dim(config)
        query, key = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, query)
        self.k_proj = Linear(config.hidden_size, key)
        self.v_proj = Linear(config.hidden_size, key)
        self.o_proj = Linear(query, config.hidden_size)
        self.attend = attend

    def heads(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> query (B, T, H, D), key and value (B, T, K, D)."""
        return rotate(self._in_heads(self.q_proj(x_BTC)), *rotation), *self.keys(x_BTC, rotation)

    def keys(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> key and value (B, T, K, D)."""
        key_BTKD, value_BTKD = (self._in_heads(project(x_BTC)) for project in (self.k_proj, self.v_proj))
        return rotate(key_BTKD, *rotation), value_BTKD

    def _in_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "B T (H D) -> B T H D", D=self.head_dim)

    def joined(self, out_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, C)."""
        return self.o_proj(rearrange(out_BTHD, "B T H D -> B T (H D)"))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return swiglu(x_BTC, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, attend: DistributedFlashAttention, memory: BlockMemory) -> None:
        super().__init__()
        self.memory, self._query_width, self._elements_again = memory, query_width(config), elements_again(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor], attention_arguments: dict) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        given = {"rotation": rotation, "attention_arguments": attention_arguments}
        function, module = (functools.partial(call, **given) for call in (self._run, self))
        parts = self._parts(x_BTC, rotation, attention_arguments)
        return self.memory.run(function, x_BTC, module=module, parts=parts)

    def compile_parts(self) -> None:
        """Compile what is before attention, and between it and the feed-forward.

        Those two stay as they are: one communicates, the other works in tiles, and both tell what keeps the block in
        memory what they would have kept. In between there is nothing that a compiler cannot see.
        """
        self._before = torch.compile(self._before, fullgraph=True)
        self._between = torch.compile(self._between, fullgraph=True)

    def _parts(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor], attention_arguments: dict) -> Parts | None:
        """The block by rows, whose queries are a tile; None where all of them are one, or rows are not all it knows.

        Whether they are one is asked of as many tokens as a rank has on average, and so the same on all ranks: the two
        ways have weights' gradients ready in another order, in which ZeRO 2 sums what ranks have. torch.compile sees
        whole blocks.
        """
        attention, mlp, device, shape = self.self_attn, self.mlp, x_BTC.device, x_BTC.shape[:-1]
        attend, sharding = attention.attend, attention_arguments.get("sharding")
        most = TILE_ELEMENTS[device.type] // self._query_width
        if torch.compiler.is_compiling() or sharding is None:
            return None
        if sharding.batch * sharding.seqlen <= most * sharding.ranks:
            return None
        projections = (part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        weights = (
            (self.input_layernorm.weight, *projections),
            (self.post_attention_layernorm.weight, attention.o_proj.weight),
            (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight),
        )
        if not self._is_all(weights, device):
            return None
        tokens, rounds = shape.numel(), sharding.query_rounds(attend.mask, most, device)
        if rounds and tokens != rounds[-1].rows.stop:
            return None  # tokens of another batch are attention's to refuse
        size = size_of_rounds(tokens, most)
        rows = [slice(first, min(first + size, tokens)) for first in range(0, max(1, tokens), size)]
        flat = tuple(angles.flatten(0, 1)[None] for angles in rotation)

        def before(x_RC: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            q_RHD, k_RKD, v_RKD = self._before(x_RC[None], (flat[0][:, rows], flat[1][:, rows]))
            return q_RHD[0], k_RKD[0], v_RKD[0]

        def keys(x_RC: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            k_RKD, v_RKD = attention.keys(self.input_layernorm(x_RC[None]), (flat[0][:, rows], flat[1][:, rows]))
            return k_RKD[0], v_RKD[0]

        def between(x_RC: Tensor, out_RHD: Tensor) -> tuple[Tensor, Tensor]:
            stream_RC, normed_RC = self._between(x_RC[None], out_RHD[None])
            return stream_RC[0], normed_RC[0]

        def at_once(*given: Tensor) -> Tensor:
            return attend(*(x.unflatten(0, shape) for x in given), **attention_arguments).flatten(0, 1)

        how = RoundAttention(attend.scale, attend.kernel, attend.deterministic)
        whole = x_BTC.element_size() * tokens * self._elements_again
        return Parts(rows, before, keys, between, weights, at_once, rounds, how, whole)

    def _is_all(self, weights: Sequence[Sequence[Tensor]], device: torch.device) -> bool:
        """Whether rounds know of everything that the block does.

        They do not of what somebody has given it more to learn, attention more to do, or to be called behind its parts
        or with its weights' gradients. Nor does their backward pass know of autocast within which the forward pass is.
        """
        attend, inside = self.self_attn.attend, self.modules()
        next(inside)  # the block itself, which is called
        return not (
            torch.is_autocast_enabled(device.type)
            or attend.softcap
            or attend.dropout
            or {id(weight) for part in weights for weight in part} != set(map(id, self.parameters()))
            or any(map(has_hooks, inside))
            or any(map(has_gradient_hooks, self.parameters()))
        )

    def _run(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor], attention_arguments: dict) -> Tensor:
        out_BTHD = self.self_attn.attend(*self._before(x_BTC, rotation), **attention_arguments)
        x_BTC, normed_BTC = self._between(x_BTC, out_BTHD)
        return self.mlp(normed_BTC).add_(x_BTC)

    def _before(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.heads(self.input_layernorm(x_BTC), rotation)

    def _between(self, x_BTC: Tensor, out_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        x_BTC = self.self_attn.joined(out_BTHD).add_(x_BTC)
        return x_BTC, self.post_attention_layernorm(x_BTC)


class Head(nn.Module):
    """Output head and loss in one module, so that logits of a whole shard never exist at once."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x_BTC: Tensor, labels_BT: Tensor | None, per_token: bool) -> Tensor:
        """Logits (B, T, vocabulary), or with labels their cross entropies in fp32: the sum, or each (B, T)."""
        if labels_BT is None:
            return F.linear(x_BTC, self.weight.to(x_BTC.dtype))
        rows = x_BTC.flatten(0, 1), self.weight, labels_BT.flatten()
        return cross_entropy(*rows).view(labels_BT.shape) if per_token else cross_entropy_sum(*rows)


class Transformer(Decoder):
    """The decoder; one call takes this rank's shard of a batch as `ringflash.shard_batch` shards it.

    Example:
        model = Transformer(ModelConfig(64, 128, 2, 2, 1), vocab_size=256)
        loss_sum = model(**shard_batch({"input_ids": torch.randint(256, (1, 512))}))
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        attention: AttentionConfig | None = None,
        group: ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Build the decoder with its initial weights; on the meta device, without any (see `initialise`).

        Args:
            config: its shape.
            vocab_size: rows of the embedding.
            attention: mask, partition and kernel; causal if None. Without a `sharding`, tokens lie zigzag if no
                partition is named.
            group: ranks that share a sequence; None for the default group, or one device where there is none.
            dtype: of the activations; weights are cast to it where they are used.
            seed: of the initial weights.
        """
        super().__init__()
        check_shape(config)
        self.config, self.dtype, self.seed = config, dtype, seed
        self.memory = BlockMemory(config.num_hidden_layers)
        self.vocab_size = vocab_size
        attention = attention or AttentionConfig()
        self._group, self._partition, self._mask = group, attention.partition, attention_mask(attention)
        self._head_ranks = attention.head_ranks
        attend = DistributedFlashAttention(
            mask=self._mask,
            group=group,
            partition=attention.partition or "zigzag",
            kernel=attention.kernel,
            deterministic=attention.deterministic,
        )
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attend, self.memory) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = Head(
            # pyrefly: ignore[bad-argument-type]  # stub: a Parameter
            self.embed_tokens.weight if tied else nn.Parameter(torch.empty(vocab_size, config.hidden_size))
        )
        for name, weight in self.named_parameters():
            if not weight.is_meta:
                self.initialise(name, weight)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        seqlen: int | None = None,
        sharding: Sharding | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Sum of this rank's cross entropies, or its logits if there are no labels.

        Args:
            input_ids: (B, T) int64, this rank's tokens.
            position_ids: (B, T), their positions in their documents.
            labels: (B, T) int64, the next tokens; -100 where there is none.
            cu_seqlens: document boundaries over the B * seqlen tokens of all ranks; with a sharding they are its own.
            seqlen: length of a sequence over all ranks; likewise.
            sharding: how the batch lies on its ranks.
            per_token: with labels, return each token's cross entropy (B, T) fp32 instead of their sum; no gradient.
        """
        x_BTC = self.embed_tokens(input_ids).to(self.dtype)
        rotation = rotary(position_ids, head_dim(self.config), self.config.rope_theta, self.config.rope_scaling)
        attention_arguments = (
            {"cu_seqlens": cu_seqlens, "seqlen": seqlen} if sharding is None else {"sharding": sharding}
        )
        self.memory.begin()
        for layer in self.layers:
            x_BTC = layer(x_BTC, rotation, attention_arguments)
        self.memory.end()
        return self.lm_head(self.norm(x_BTC), labels, per_token)

    def whole_blocks(self) -> list[nn.Module]:
        """See Decoder."""
        return list(self.layers)

    def attention_width(self) -> int:
        """See Decoder."""
        return 2 * len(self.layers) * self.config.num_attention_heads * head_dim(self.config)

    def compile_blocks(self) -> None:
        """See Decoder."""
        for block in self.layers:
            block.compile_parts()  # pyrefly: ignore[not-callable]  # a Block

    def parts(self) -> list[nn.Module]:
        """See Decoder."""
        if self.config.tie_word_embeddings:
            return list(self.layers)
        return [self.embed_tokens, *self.layers, self.lm_head]

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """See Decoder."""
        how = {"head_ranks": self._head_ranks, "token_work": token_work(self.config.hidden_size)}
        shard = shard_batch(batch, self._group, self._partition, self._mask, **how)
        return {name: shard[name] for name in ("input_ids", "labels", "position_ids", "sharding")}

    def description(self) -> dict[str, Any]:
        """See Decoder."""
        return dataclasses.asdict(self.config) | {"vocab_size": self.vocab_size}

    @torch.no_grad()
    def initialise(self, name: str, weight: Tensor) -> None:
        """Fill a parameter with its initial weights, the same whichever others a rank fills, and in whichever order.

        Each has a random generator of its own, so that a rank that cannot hold the whole model fills one at a time.

        Args:
            name: of the parameter.
            weight: fp32 tensor of its shape; a GPU draws other numbers than a CPU.
        """
        if weight.dim() == 1:
            weight.fill_(1)
            return
        generator = generator_of(self.seed, name, weight.device)
        # Each block adds to the residual stream twice; smaller output matrices keep its variance in check.
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        weight.normal_(std=0.02 / math.sqrt(2 * len(self.layers)) if residual else 0.02, generator=generator)


def generator_of(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Random numbers of one parameter, whichever others a rank draws."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


def attention_mask(config: AttentionConfig) -> Mask:
    """The Mask that a configuration names; documents are added by cu_seqlens in each call."""
    if config.mask == "sliding_window":
        return Mask.sliding_window(config.window, sink=config.sink)
    if config.mask == "chunked":
        return Mask.causal() & Mask.chunked(config.chunk)
    return Mask.causal()
