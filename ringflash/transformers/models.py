"""What SequenceParallel has to know of a model before its tokens are sharded, and what it refuses by name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ringflash.errors import ArgumentError

ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Layer types of Transformers whose tokens meet in softmax attention alone."""

STATEFUL = re.compile(
    r"mamba|deltanet|linearattention|lightning|recurrent|rglru|rwkv|lstm|shortconv|hyena|retention", re.IGNORECASE
)
"""Names of modules that carry a state from token to token."""


POOLED = re.compile(r"For(SequenceClassification|MultipleChoice|NextSentencePrediction)$")
"""Names of models whose output is made of one token of each sequence, which one rank alone has."""

ROUTER_LOSS = (
    "output_router_logits=True: the loss that balances experts is a function of the whole batch, and each rank would "
    "take it of its own tokens; {}"
)

MEETING = ("trigram_input", "token_dropout")
"""Settings by which tokens meet in the embeddings: of MobileBERT's neighbours, and of ESM's share of masked tokens."""

BEFORE_FIRST = -1
"""`position_of_padding` of OPT, which counts tokens that attention_mask shows from 0 on."""


def pretrained_of(model: nn.Module) -> PreTrainedModel:
    """The outermost Transformers model within a module: a model as it is, or inside of PEFT, DDP, FSDP, a compiled one.

    Raises:
        ArgumentError: there is none, or its attention is not "ring".
    """
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ArgumentError(f"model is a {type(model).__name__}; allowed are Transformers models, also in wrappers")
    for module in found.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != "ring":
            raise ArgumentError(
                f"{type(module).__name__} has attn_implementation={module.config._attn_implementation!r}; load the "
                'model with attn_implementation="ring", or call model.set_attn_implementation("ring")'
            )
    return found


def check_shardable(model: PreTrainedModel) -> None:
    """Raise ArgumentError where tokens meet elsewhere than in attention, or where the model counts positions itself."""
    for number, kind in enumerate(getattr(model.config.get_text_config(), "layer_types", None) or ()):
        if kind not in ATTENTION_TYPES:
            raise ArgumentError(
                f"layer {number} of {type(model).__name__} is of type {kind}; allowed on several ranks are "
                f"{', '.join(ATTENTION_TYPES)}"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) or (
            STATEFUL.search(type(module).__name__) and not isinstance(module, PreTrainedModel)
        ):
            raise ArgumentError(
                f"{name} of {type(model).__name__} is a {type(module).__name__}, which carries a state from token to "
                "token; allowed on several ranks are layers whose tokens meet in softmax attention alone"
            )
    if not any(_calls_attention_functions(type(module)) for module in model.modules()):
        raise ArgumentError(
            f"{type(model).__name__} computes attention itself, whatever its attn_implementation; allowed on several "
            "ranks are models that call Transformers' attention functions"
        )
    if meeting := [name for name in MEETING if getattr(model.config, name, False)]:
        raise ArgumentError(
            f"{type(model).__name__} has {meeting[0]}=True, by which tokens meet in the embeddings; allowed on several "
            "ranks are models whose tokens meet in softmax attention alone"
        )
    if POOLED.search(type(model).__name__):
        raise ArgumentError(
            f"{type(model).__name__} scores one token of each sequence, which one rank alone has; allowed on several "
            "ranks are models with an output for each token. Shard its base model and put its head on the token chosen "
            "from sharding.unshard(last_hidden_state, 1), or use AutoModelForTokenClassification"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ArgumentError(ROUTER_LOSS.format("set model.config.output_router_logits = False"))
    needed = ["position_ids", *(["decoder_position_ids"] if model.config.is_encoder_decoder else [])]
    if missing := [name for name in needed if name not in inspect.signature(model.forward).parameters]:
        raise ArgumentError(
            f"{type(model).__name__} takes no {missing[0]}: it counts positions from the first token of each rank"
        )


def _calls_attention_functions(layer: type) -> bool:
    """Whether the file of a layer's class, or of one that it derives from, looks attention functions up."""
    files = {owner.__module__ for owner in layer.__mro__} - {PreTrainedModel.__module__}
    return any(hasattr(sys.modules.get(name), "ALL_ATTENTION_FUNCTIONS") for name in files)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether tokens see earlier ones only."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether a token predicts the next one; where it predicts itself, labels are not shifted."""
    return getattr(model, "loss_type", None) != "ForMaskedLM"


def scales_by_place(model: PreTrainedModel) -> bool:
    """Whether layers scale queries by their place in the row, as Llama 4's without rotary embedding do."""
    return any(getattr(module, "attn_temperature_tuning", False) for module in model.modules())


def position_of_padding(model: PreTrainedModel) -> int | None:
    """Position behind which a model counts tokens that are no padding (RoBERTa, OPT); None if it counts all, from 0."""
    if model.config.model_type == "opt":
        return BEFORE_FIRST
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.padding_idx
    return None


def rotary_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Modules whose frequencies depend on the longest sequence ("dynamic" and "longrope")."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            yield module
