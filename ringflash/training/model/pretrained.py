"""A model of Transformers, from a Hugging Face folder, as the recipe's decoder.

Its attention is "ring". It is built on the meta device and filled parameter by parameter from the folder's files, so
that under ZeRO 3 no rank ever holds more than its share and one parameter.

Legend: B sequences, S tokens of one sequence over all ranks, T of them on this rank.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ringflash.configs.schema import ROPE, LoraConfig, ModelConfig, entries
from ringflash.errors import ArgumentError, DataError
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.training.memory.blocks import BlockMemory
from ringflash.training.memory.plan import AUTO, KEEP
from ringflash.training.memory.rows import TILE_ELEMENTS, tiled
from ringflash.training.model.adapters import BASE, add_adapters, initialise_adapter, is_adapter
from ringflash.training.model.decoder import Decoder
from ringflash.training.model.folder import FolderWeights
from ringflash.training.model.transformer import generator_of
from ringflash.transformers import SequenceParallel
from ringflash.transformers.models import check_shardable
from ringflash.transformers_private import run_layers_by

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations have for how many experts a layer has."""

PREFIX = "model."
"""In front of the names that Transformers has for the parameters."""


class Pretrained(Decoder):
    """A causal language model of Transformers; see Decoder.

    Args:
        config: `path` is its folder; `rope_parameters` change its rotary embedding.
        group: ranks that share a sequence; None for one device.
        partition: how a sequence lies on them, as in `SequenceParallel`.
        dtype: of the activations; weights are in it too, or in fp32 and computed with by autocast.
        seqlen: tokens of a sequence, for its config.json.
        lora: adapters, which alone are trained then.
        seed: of the adapters' initial weights.
        head_ranks: as in `SequenceParallel`.
        read: its weights are to be read; else config.json is enough, for a model that is only looked at.
        layers: of these no more than so many; None: all.

    Raises:
        ArgumentError: a model that "ring" does not take, or whose loss is another one than cross entropy.
        DataError: a folder that cannot be read.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: ProcessGroup | None = None,
        partition: str | None = None,
        dtype: torch.dtype = torch.float32,
        seqlen: int = 0,
        lora: LoraConfig | None = None,
        seed: int = 0,
        head_ranks: int | None = None,
        read: bool = True,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        assert config.path is not None
        folder = self._folder = Path(config.path).expanduser()
        self.config = changed(read_config(folder), config, seqlen)
        if layers is not None:
            _shorten(self.config.get_text_config(), layers)
        self.dtype, self.vocab_size = dtype, self.config.get_text_config().vocab_size
        self._generation = _generation(folder)
        self.model = empty_model(self.config, f"model.path={folder}")
        if read:
            self._weights = FolderWeights(folder, self.model)
        self._seed, self._lora = seed, lora if lora is not None and lora.rank else None
        if self._lora is not None:
            add_adapters(self.model, self._lora)
        _refuse_dropout(self.model, folder)
        self._tiled: list[nn.Module] = []
        self._mean = 0
        self.memory = BlockMemory(self.config.get_text_config().num_hidden_layers)
        try:
            check_shardable(self.model)  # on one rank too: where a state is carried, packed documents see each other
            self._sequence = SequenceParallel(self.model, ONE_DEVICE if group is None else group, partition, head_ranks)
            self._sequence.fuse_loss()  # logits of a long sequence need more memory than anything else
        except ArgumentError as error:
            raise ArgumentError(f"model.path={folder}: {error}") from error

    def forward(self, per_token: bool = False, **shard: Any) -> Tensor:
        """See Decoder."""
        shard["shift_labels"], sharding = shard["labels"], shard["sharding"]
        self._mean = -(-sharding.batch * sharding.seqlen // sharding.ranks)
        weight = next(weight for weight in self.parameters() if weight.requires_grad)
        # FSDP2 casts what it gathers; a weight that it has divided is not gathered yet.
        cast = self.dtype != torch.float32 and weight.dtype == torch.float32 and not isinstance(weight, DTensor)
        with torch.autocast(weight.device.type, self.dtype, enabled=cast):
            if per_token:
                return self._sequence.token_losses(shard)
            self.memory.begin()
            loss = self.model(**shard, num_items_in_batch=1, use_cache=False).loss
            self.memory.end()
            return loss

    @property
    def recomputes(self) -> bool:
        """Whether its layers can be computed again."""
        return self.model.supports_gradient_checkpointing

    def keep(self, policy: str, device: torch.device, host_bytes: int | None = None) -> None:
        """See Decoder."""
        if policy == AUTO and not self.recomputes:
            policy = KEEP
        super().keep(policy, device, host_bytes)
        if policy == KEEP:
            return
        try:
            run_layers_by(self.model, self.memory.run)
        except ValueError as error:
            raise ArgumentError(f"engine.memory={policy}: {error}; allowed is {KEEP}") from error
        self._tiled = feed_forwards(self.model)
        for module in self._tiled:
            module.forward = functools.partial(self._in_tiles, module, module.forward, TILE_ELEMENTS[device.type])
        if self._lora is not None:  # else nothing in front of the first adapter has a gradient, which engines wait for
            self.model.enable_input_require_grads()

    def whole_blocks(self) -> list[nn.Module]:
        """See Decoder; what is in tiles calls its parts often, and ranks do so a different number of times."""
        return self._tiled

    def _in_tiles(self, module: nn.Module, forward: Callable[[Tensor], Tensor], elements: int, x: Tensor) -> Tensor:
        return tiled(forward, x, tuple(module.parameters()), width_of(module), self._mean, elements)

    def attention_width(self) -> int | None:
        """See Decoder; some models have heads of other widths in some layers."""
        text: Any = self.config.get_text_config()
        layers, heads, head = text.num_hidden_layers, text.num_attention_heads, getattr(text, "head_dim", None)
        if not isinstance(heads, int) or getattr(text, "global_head_dim", None) is not None:
            return None
        head = head or text.hidden_size // heads
        key, value = (getattr(text, name, None) or head for name in ("qk_head_dim", "v_head_dim"))  # latent attention
        return layers * heads * (key + value)

    def experts_share(self) -> float | None:
        """See Decoder."""
        text = self.config.get_text_config()
        chosen = getattr(text, "num_experts_per_tok", None)
        experts = next((found for name in EXPERTS if (found := getattr(text, name, None))), None)
        return chosen / experts if chosen and experts else None

    def compile_blocks(self) -> None:
        """See Decoder; of layers whose insides only Transformers knows, norms and feed-forwards."""
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        norms = {part for layer in layers for part in layer.modules() if type(part).__name__.endswith("Norm")}
        for module in (*norms, *feed_forwards(self.model)):
            module.forward = torch.compile(module.forward, fullgraph=True)

    @property
    def layers(self) -> list[nn.Module]:
        """Its layers, in the order in which they run."""
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        within = {part for layer in layers for part in layer.modules() if part is not layer}
        return [layer for layer in layers if layer not in within]

    def parts(self) -> list[nn.Module]:
        """See Decoder."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        return [*([] if tied else [embedding]), *self.layers]

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """See Decoder."""
        ids = batch["input_ids"]
        positions = positions_in_documents(batch["cu_seqlens"], *ids.shape)
        shard = self._sequence.shard_alike({"labels": ids} | batch | {"position_ids": positions})
        del shard["num_items_in_batch"]
        if "row_positions" in shard:  # Llama 4 scales queries by their place in the row: here, in their document
            shard["row_positions"] = shard["position_ids"]
        return shard | {"labels": shard.pop("shift_labels")}

    def source(self) -> str:
        """See Decoder."""
        return self._weights.digest

    def passed_over(self) -> str:
        """See Decoder."""
        return str(self._weights.passed_over)

    def description(self) -> dict[str, Any]:
        """See Decoder."""
        kept = self.model.state_dict().keys() - dict(self.model.named_parameters(remove_duplicate=False)).keys()
        lora = None if self._lora is None else vars(self._lora) | {"weights": self.source()}
        return {
            "folder": str(self._folder.absolute()),
            "lora": lora,
            "huggingface": json.loads(self.config.to_json_string(use_diff=False)),
            "generation": self._generation,
            "buffers": {name.replace(BASE, ""): self.model.get_buffer(name).tolist() for name in sorted(kept)},
        }

    @torch.no_grad()
    def initialise(self, name: str, weight: Tensor) -> None:
        """See Decoder."""
        if is_adapter(name):
            initialise_adapter(name, weight, generator_of(self._seed, name, weight.device))
        else:
            weight.copy_(self._weights.read(name.removeprefix(PREFIX).replace(BASE, "")))


def feed_forwards(model: nn.Module) -> list[nn.Module]:
    """Parts of a model's layers that look at one token at a time, by the name that Transformers gives to their classes.

    Experts are none of them: they take the tokens that a router sends them.
    """
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    parts = (part for layer in layers for part in layer.children() if type(part).__name__.endswith("MLP"))
    return [part for part in parts if any(isinstance(each, nn.Linear) for each in part.modules())]


def width_of(feed_forward: nn.Module) -> int:
    """Of the widest that a feed-forward makes of a token."""
    return max(each.out_features for each in feed_forward.modules() if isinstance(each, nn.Linear))


def read_config(folder: Path) -> PreTrainedConfig:
    """The config.json of a folder."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of damaged files it raises anything
        raise DataError(f"model.path={folder}: cannot read its config.json: {_said(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise DataError(
            f"model.path={folder}: its weights are quantized; load them with "
            "AutoModelForCausalLM.from_pretrained(..., dtype=torch.bfloat16), dequantize() and save_pretrained() first"
        )
    return config


def changed(config: PreTrainedConfig, wanted: ModelConfig, seqlen: int) -> PreTrainedConfig:
    """A configuration with `model.rope_parameters` in the place of its own, for sequences of `seqlen` tokens."""
    text = config.get_text_config()
    rope = {key: value for key, value, _ in entries(wanted.rope_parameters) if value is not None}
    if rope:
        text.rope_parameters = _changed_rope(rope, text)
        if getattr(text, "head_dim", 0) is None:  # which Transformers' formulas do not expect
            text.head_dim = text.hidden_size // text.num_attention_heads
    kept = getattr(text, "rope_parameters", None)
    # To "dynamic" it is the context that the model was trained with, beyond which frequencies change.
    if kept and kept.get("rope_type") != "dynamic" and getattr(text, "max_position_embeddings", seqlen) < seqlen:
        text.max_position_embeddings = seqlen
    if rope:
        _check_kept(config, text.rope_parameters["rope_type"])
    return config


def _shorten(text: Any, layers: int) -> None:
    """Leave the first layers of a configuration alone; what it says of each layer is a list of as many."""
    all_layers = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == all_layers:
            setattr(text, name, value[:layers])


def _changed_rope(rope: dict[str, Any], text: Any) -> dict[str, Any]:
    kept = getattr(text, "rope_parameters", None)
    if not isinstance(kept, dict) or any(isinstance(value, dict) for value in kept.values()):
        raise ArgumentError(
            f"model.rope_parameters: {type(text).__name__} has {kept}; allowed are models with one rotary embedding"
        )
    there = kept.get("rope_type", "default")
    kind = rope.get("rope_type", there)
    original = kept.get("original_max_position_embeddings", text.max_position_embeddings)
    if kind != there:  # a scaling's numbers mean nothing to another
        kept = {key: value for key, value in kept.items() if key in ("rope_theta", "partial_rotary_factor")}
    _check_rope(rope, kind, kept, text)
    first = {} if kind in ("default", "dynamic") else {"original_max_position_embeddings": original}
    return {"rope_type": kind} | kept | first | rope


def _check_kept(config: PreTrainedConfig, kind: str) -> None:
    """Raise ArgumentError if the model's own class reads another type of rotary embedding than was written."""
    settings = config.to_dict()
    try:
        read = AutoConfig.for_model(settings.pop("model_type"), **settings).get_text_config().rope_parameters
    except (KeyError, ValueError) as error:
        raise ArgumentError(
            f"model.rope_parameters.rope_type={kind}: {type(config).__name__} refuses it: {error}"
        ) from error
    if read["rope_type"] != kind:
        raise ArgumentError(
            f"model.rope_parameters.rope_type={kind}: {type(config).__name__} makes {read['rope_type']} of it"
        )


def _check_rope(rope: dict[str, Any], kind: str, kept: dict[str, Any], text: Any) -> None:
    """Raise ArgumentError for keys that mean nothing to this type of rotary embedding, are missing, or too long."""
    if kind not in ROPE:  # one that only config.json can ask for
        return
    needed, others = ROPE[kind]
    for key, value in rope.items():
        if key not in ("rope_type", "rope_theta", *needed, *others):
            takes = ", ".join(("rope_theta", *needed, *others))
            raise ArgumentError(
                f"model.rope_parameters.{key}={value} means nothing to rope_type={kind}, which takes {takes}"
            )
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        frequencies = int(size * kept.get("partial_rotary_factor", 1.0)) // 2
        if isinstance(value, list) and len(value) != frequencies:
            raise ArgumentError(
                f"model.rope_parameters.{key} has {len(value)} numbers; allowed are {frequencies}, one a frequency"
            )
    for key in needed:
        if key not in kept | rope:
            raise ArgumentError(f"model.rope_parameters.rope_type={kind} needs model.rope_parameters.{key}")


def empty_model(config: PreTrainedConfig, said: str) -> PreTrainedModel:
    """A model on the meta device, but for its buffers, which have their values.

    Args:
        config: which.
        said: in front of the message of an error.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="ring", dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # of numbers that do not go together it raises anything
        if isinstance(error, KeyError) and error.args == ("ring",):  # a table of its own attention modules has none
            raise ArgumentError(f"{said}: a {config.model_type} computes attention itself") from error
        raise ArgumentError(f"{said}: its config.json gives no model: {_said(error)}") from error
    model.tie_weights()
    return model


def _said(error: Exception) -> str:
    """One line of what a library says, by its kind where that is a bare word."""
    said = " ".join(str(error).split())
    return said if " " in said else f"{type(error).__name__}: {said}"


def positions_in_documents(cu_seqlens: Any, size: int, seqlen: int) -> Tensor:
    """Position of each token in its document, (B, S) int64; a tail behind the last document is one more."""
    bounds = np.unique(np.array([*cu_seqlens, size * seqlen], np.int64))
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    return torch.from_numpy(np.arange(size * seqlen) - starts).view(size, seqlen)


def _generation(folder: Path) -> dict[str, Any] | None:
    """How the model of a folder is to generate, if the folder says so."""
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: cannot read {path}: {error}; copy it anew") from error
    if not isinstance(found, dict | None):
        raise DataError(f"model.path: {path} holds no object; copy it anew")
    return found


def _refuse_dropout(model: nn.Module, folder: Path) -> None:
    # Each rank would draw its own for its own tokens, so the loss would depend on their number.
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    config: Any = model.config
    if names or getattr(config, "attention_dropout", 0):
        where = names[0] if names else "attention"
        raise ArgumentError(
            f"model.path={folder}: {where} has dropout, and training here has none; set it to 0 in its config.json"
        )
