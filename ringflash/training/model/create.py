"""The model that a configuration asks for: the small Llama that is built here, or one of Transformers."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError
from ringflash.training.config.derived import compute_dtype, vocabulary
from ringflash.training.model.decoder import Decoder
from ringflash.training.model.transformer import Transformer


def create_model(config: Config, tokens: int, group: ProcessGroup | None) -> Decoder:
    """A decoder whose parameters are on the meta device.

    Args:
        config: checked.
        tokens: of the tokenizer.
        group: ranks that share a sequence.
    """
    dtype, checkpointing = compute_dtype(config), config.engine.activation_checkpointing
    if config.model.path is None:
        with torch.device("meta"):
            return Transformer(
                config.model,
                vocabulary(config.model, tokens),
                config.attention,
                group,
                dtype,
                checkpointing,
                config.seed,
            )
    from ringflash.training.model.pretrained import Pretrained  # an optional library

    model = Pretrained(
        config.model,
        group,
        config.attention.partition,
        dtype,
        config.train.seqlen,
        checkpointing,
        config.lora,
        config.seed,
    )
    if model.vocab_size < tokens:
        raise ArgumentError(
            f"data.tokenizer={config.data.tokenizer} has {tokens} tokens, model.path={config.model.path} an embedding "
            f"of {model.vocab_size}; give the model's own tokenizer"
        )
    return model
