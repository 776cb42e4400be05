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
    dtype = compute_dtype(config)
    if config.model.path is None:
        with torch.device("meta"):
            rows = vocabulary(config.model, tokens)
            return Transformer(config.model, rows, config.attention, group, dtype, config.seed)
    from ringflash.training.model.pretrained import Pretrained  # an optional library

    seqlen, seed = config.train.seqlen, config.seed
    partition, head_ranks = config.attention.partition, config.attention.head_ranks
    model = Pretrained(config.model, group, partition, dtype, seqlen, config.lora, seed, head_ranks)
    if model.vocab_size < tokens:
        raise ArgumentError(
            f"data.tokenizer={config.data.tokenizer} has {tokens} tokens, model.path={config.model.path} an embedding "
            f"of {model.vocab_size}; give the model's own tokenizer"
        )
    return model
