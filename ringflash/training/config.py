"""From a composed configuration to a checked one, the same on every rank.

`composing` and the schema refuse wrong keys and types by name; here are the checks of values, each naming its key.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringflash.configs.schema import Config, ModelConfig
from ringflash.errors import ArgumentError, RankMismatchError
from ringflash.kernels.select import NAMES as KERNELS
from ringflash.kernels.select import select
from ringflash.training.checkpoint import MANIFEST

CHOICES = {
    "device": ("auto", "cuda", "cpu"),
    "engine.name": ("ddp", "zero1", "zero2", "zero3"),
    "engine.precision": ("auto", "fp32", "bf16"),
    "attention.mask": ("causal", "sliding_window", "chunked"),
    "attention.partition": ("contiguous", "zigzag", "balanced"),
    "attention.kernel": KERNELS,
}
AT_LEAST_TWO = ("train.seqlen",)  # one token to predict from another
AT_LEAST_ONE = (
    "train.steps",
    "train.global_batch",
    "train.micro_batch",
    "train.sequence_degree",
    "train.validation_sequences",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.rope_scaling.original_max_position_embeddings",
    "data.max_bytes",
    "attention.chunk",
    "checkpoint.keep",
    "logging.every",
)
AT_LEAST_ZERO = (
    "seed",
    "train.validate_every",
    "checkpoint.every",
    "attention.window",
    "attention.sink",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip",
)
POSITIVE = (
    "timeout",
    "optimizer.lr",
    "optimizer.eps",
    "model.rope_theta",
    "model.rms_norm_eps",
    "data.validation_fraction",
)
SHARES = ("optimizer.min_lr_ratio", "optimizer.beta1", "optimizer.beta2", "data.validation_fraction")
SMALLEST_VOCABULARY = 257
"""Tokens of the bytes tokenizer, and of a BPE without any merges."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 300, ...} of a Config."""
    flat = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{entry.name}.")
        else:
            flat[prefix + entry.name] = value
    return flat


def check(config: Config, world_size: int) -> None:
    """Raise ArgumentError, naming the key, for values that cannot work on this many ranks."""
    flat = flatten(config)
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise ArgumentError(f"{key}={flat[key]!r}; allowed are {', '.join(allowed)}")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"{key}={value}; allowed are finite numbers")
    for keys, least in ((AT_LEAST_TWO, 2), (AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for key in keys:
            if flat[key] is not None and flat[key] < least:
                raise ArgumentError(f"{key}={flat[key]}; allowed are {least} and more")
    for key in POSITIVE:
        if flat[key] <= 0:
            raise ArgumentError(f"{key}={flat[key]}; it must be positive")
    for key in SHARES:
        if not 0 <= flat[key] < 1:
            raise ArgumentError(f"{key}={flat[key]}; allowed are 0 up to, not including, 1")
    if config.seed >= 1 << 64:
        raise ArgumentError(f"seed={config.seed}; allowed are 0 up to, not including, 2^64")
    _check_vocabulary(config)
    check_model(config.model)
    _check_kernel(config)
    _check_ranks(config, world_size)
    _check_resume(config.checkpoint.resume)


def check_model(model: ModelConfig) -> None:
    """Raise ArgumentError for head counts and widths that do not fit together."""
    heads, key_value_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % key_value_heads:
        raise ArgumentError(
            f"model.num_attention_heads={heads} is not divisible by model.num_key_value_heads={key_value_heads}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise ArgumentError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads={heads}; "
            "change one of them or give model.head_dim"
        )
    if model.rope_scaling.factor <= 0 or model.rope_scaling.low_freq_factor >= model.rope_scaling.high_freq_factor:
        raise ArgumentError(
            f"model.rope_scaling={model.rope_scaling}; factor must be positive, low_freq_factor below high_freq_factor"
        )
    width = head_dim(model)
    if width % 2 or not 2 <= width <= 256:
        raise ArgumentError(f"model.head_dim={width}; rotary embedding needs an even one, and kernels take up to 256")


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def sequence_degree(config: Config, world_size: int) -> int:
    """Ranks that share one sequence."""
    return config.train.sequence_degree or world_size


def accumulation(config: Config, world_size: int) -> int:
    """Micro-batches of one optimizer step on each group of ranks."""
    data_ranks = world_size // sequence_degree(config, world_size)
    return config.train.global_batch // (config.train.micro_batch * data_ranks)


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


def agree(config: Config) -> None:
    """Raise RankMismatchError on every rank if one was started with another configuration; the first collective."""
    flat = flatten(config) | {"engine.precision of its GPU": str(compute_dtype(config))}
    everybody: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, flat)
    for rank, other in enumerate(everybody):
        for key in sorted({*everybody[0], *other}):
            first, value = everybody[0].get(key, "no such key"), other.get(key, "no such key")
            if first != value:
                raise RankMismatchError(
                    f"rank {rank} was started with {key}={value}, rank 0 with {key}={first}; give all ranks the same"
                )


def _check_vocabulary(config: Config) -> None:
    tokenizer = config.data.tokenizer
    if tokenizer not in ("bpe", "bytes"):
        return  # a folder's tokenizer may have any size, and says which only when it is read
    sizes = {"model.vocab_size": config.model.vocab_size}
    if tokenizer == "bpe":
        sizes["data.vocab_size"] = config.data.vocab_size
    for key, size in sizes.items():
        if size is not None and size < SMALLEST_VOCABULARY:
            least = f"{SMALLEST_VOCABULARY} and more: 256 bytes and the separator"
            raise ArgumentError(f"{key}={size}; data.tokenizer={tokenizer} needs {least}")


def _check_kernel(config: Config) -> None:
    # On GPUs attention itself tells: here no rank has chosen its GPU yet, and asking would start CUDA on the first.
    if device_type(config) == "cpu":
        try:
            select("cpu", compute_dtype(config), head_dim(config.model), kernel=config.attention.kernel)
        except ArgumentError as error:
            raise ArgumentError(f"attention.{error}") from error


def _check_resume(resume: str) -> None:
    if resume not in ("auto", "never") and not (Path(resume) / MANIFEST).is_file():
        state = f"no {MANIFEST} in it" if Path(resume).is_dir() else "no such folder"
        raise ArgumentError(f"checkpoint.resume={resume}: {state}; allowed are auto, never and a checkpoint's folder")


def _check_ranks(config: Config, world_size: int) -> None:
    train, degree = config.train, sequence_degree(config, world_size)
    if world_size % degree:
        raise ArgumentError(f"train.sequence_degree={degree} does not divide the {world_size} ranks")
    data_ranks = world_size // degree
    if train.global_batch % (train.micro_batch * data_ranks):
        raise ArgumentError(
            f"train.global_batch={train.global_batch} is not divisible by train.micro_batch={train.micro_batch} x "
            f"{data_ranks} data-parallel groups ({world_size} ranks / sequence degree {degree})"
        )
    if config.attention.partition == "balanced" and train.micro_batch > 1:
        raise ArgumentError(
            "attention.partition=balanced levels the work of one packed sequence, so "
            f"train.micro_batch={train.micro_batch} must be 1 (train.global_batch may be more)"
        )
    if train.seqlen < degree:
        raise ArgumentError(f"train.seqlen={train.seqlen} is shorter than the {degree} ranks that share a sequence")
