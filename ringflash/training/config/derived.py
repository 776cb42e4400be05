"""What a configuration comes to on this many ranks and this machine, where a key leaves it open."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from ringflash.configs.schema import Config, DataConfig, ModelConfig, SourceConfig
from ringflash.errors import ArgumentError
from ringflash.training.checkpoint.files import found_at

TOKENIZER = "tokenizer"
"""Folder of a run that holds its tokenizer."""


def sequence_degree(config: Config, world_size: int) -> int:
    """Ranks that share one sequence."""
    return config.train.sequence_degree or world_size


def accumulation(config: Config, world_size: int) -> int:
    """Micro-batches of one optimizer step on each group of ranks."""
    data_ranks = world_size // sequence_degree(config, world_size)
    return config.train.global_batch // (config.train.micro_batch * data_ranks)


def steps_of(config: Config, samples_per_epoch: int | None) -> int:
    """Optimizer steps of the run; with train.epochs as many as hold them, the last one with some of the next epoch."""
    epochs = config.train.epochs
    if epochs is None:
        return config.train.steps
    if samples_per_epoch is None:
        raise ArgumentError(
            f"train.epochs={epochs}: nobody knows ahead how long an epoch of a stream or a mixture is; give train.steps"
        )
    return math.ceil(epochs * samples_per_epoch / config.train.global_batch)


def saved_every(config: Config) -> int:
    """Steps between checkpoints; 0: there are none between."""
    every = config.checkpoint.every
    return 0 if isinstance(every, str) else every


def saves_beside_training(config: Config, steps: int) -> bool:
    """Whether a run of so many steps writes checkpoints, from a copy in host memory, while it goes on."""
    return config.checkpoint.background and 0 < saved_every(config) < steps


def device_type(config: Config) -> str:
    """Type of device to run on; asking for a GPU where there is none is an error."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ArgumentError("device=cuda, but torch finds no GPU here; allowed are cpu and auto")
    return "cuda" if available and config.device != "cpu" else "cpu"


def compute_dtype(config: Config) -> torch.dtype:
    """Dtype of activations: what engine.precision says, and for auto bfloat16 on GPUs that compute it."""
    precision = config.engine.precision
    if precision == "auto":
        # torch.cuda.is_bf16_supported() also says yes to GPUs that only emulate it, slower than fp32.
        computed = device_type(config) == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16" if computed else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def sources(data: DataConfig) -> list[DataConfig]:
    """Each source as if it were the only one."""

    def alone(source: SourceConfig) -> DataConfig:
        own = {name: value for name, value in vars(source).items() if name != "weight" and value is not None}
        return dataclasses.replace(data, **own, mixture=[])

    return [alone(source) for source in data.mixture] or [data]


def tokenizer_of(config: Config) -> str:
    """What data.tokenizer stands for: null is the model's own, that of the run whose weights are taken, or "bpe"."""
    chosen = config.data.tokenizer or config.model.path
    if chosen is None and config.checkpoint.weights is not None:
        path = found_at(Path(config.checkpoint.weights))
        folder = None if path is None else path.parent.parent / TOKENIZER
        chosen = str(folder) if folder is not None and folder.is_dir() else None
    return chosen or "bpe"


def vocabulary(model: ModelConfig, tokens: int) -> int:
    """Rows of the embedding for a tokenizer of so many tokens."""
    if model.vocab_size is None:
        return -(-tokens // 64) * 64
    if model.vocab_size < tokens:
        raise ArgumentError(f"model.vocab_size={model.vocab_size} is less than the {tokens} tokens of the tokenizer")
    return model.vocab_size
