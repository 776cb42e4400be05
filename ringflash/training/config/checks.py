"""Values that cannot work, each refused by its key before anything is started.

Wrong keys and types are refused while composing. The bounds of a value by itself stand with its key, in
ringflash.configs.schema; here they are compared, and after them what several keys, the ranks or the machine must fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringflash.configs.schema import Config, ModelConfig, entries
from ringflash.errors import ArgumentError
from ringflash.kernels.select import select
from ringflash.training.checkpoint.files import MANIFEST, found_at, is_complete
from ringflash.training.config.derived import compute_dtype, device_type, sequence_degree, sources, tokenizer_of
from ringflash.training.corpus.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from ringflash.training.engines import deepspeed_json
from ringflash.training.extras import require
from ringflash.training.model.shape import check_shape, head_dim

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Keys that say how large the Llama of this recipe is."""

OF_LAYERS = ("mask", "kernel", "deterministic")
"""Keys of `attention` that layers of Transformers choose themselves."""

SMALLEST_VOCABULARY = 257
"""Tokens of the bytes tokenizer, and of a BPE without any merges."""


def check(config: Config, world_size: int) -> None:
    """Raise ArgumentError, naming the key, for values that cannot work on this many ranks."""
    for key, value, bounds in entries(config):
        if value is not None:
            _check_bounds(key, value, bounds)
    for number, source in enumerate(config.data.mixture):
        for key, value, bounds in entries(source, f"data.mixture[{number}]."):
            if value is not None:
                _check_bounds(key, value, bounds)
    _check_data(config)
    _check_lora(config)
    _check_optimizer(config)
    _check_engine(config, world_size)
    _check_logging(config)
    _check_vocabulary(config)
    if config.model.path is None:
        _check_own_model(config.model)
        _check_kernel(config)
    else:
        _check_pretrained(config)
    _check_ranks(config, world_size)
    _check_resume(config.checkpoint.resume)
    _check_weights(config)


def _check_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Compare one value with its field's metadata; ringflash.configs.schema says what the names mean."""
    choices, least = bounds.get("choices"), bounds.get("at_least")
    if choices is not None and value not in choices:
        raise ArgumentError(f"{key}={value!r}; allowed are {', '.join(choices)}")
    if "words" in bounds and isinstance(value, str):
        if value in bounds["words"]:
            return
        raise ArgumentError(f"{key}={value}; allowed are {', '.join(bounds['words'])}, {least} and more")
    if isinstance(value, float) and not math.isfinite(value):
        raise ArgumentError(f"{key}={value}; allowed are finite numbers")
    if least is not None and value < least:
        words = "".join(f"{word}, " for word in bounds.get("words", ()))
        raise ArgumentError(f"{key}={value}; allowed are {words}{least} and more")
    if bounds.get("positive") and value <= 0:
        raise ArgumentError(f"{key}={value}; it must be positive")
    if bounds.get("share") and not 0 <= value < 1:
        raise ArgumentError(f"{key}={value}; allowed are 0 up to, not including, 1")
    if "bits" in bounds and value >= 1 << bounds["bits"]:
        raise ArgumentError(f"{key}={value}; allowed are 0 up to, not including, 2^{bounds['bits']}")


def _check_vocabulary(config: Config) -> None:
    tokenizer = tokenizer_of(config)
    if tokenizer not in ("bpe", "bytes"):
        return  # a folder's tokenizer may have any size, and says which only when it is read
    sizes = {"model.vocab_size": config.model.vocab_size}
    if tokenizer == "bpe":
        sizes["data.vocab_size"] = config.data.vocab_size
    for key, size in sizes.items():
        if size is not None and size < SMALLEST_VOCABULARY:
            least = f"{SMALLEST_VOCABULARY} and more: 256 bytes and the separator"
            raise ArgumentError(f"{key}={size}; data.tokenizer={tokenizer} needs {least}")


def _check_data(config: Config) -> None:
    data, tokenizer = config.data, tokenizer_of(config)
    if data.mixture and data.path is not None:
        raise ArgumentError(f"data.path={data.path} beside data.mixture; leave one of them out")
    for number, source in enumerate(data.mixture):
        if not source.path:
            raise ArgumentError(
                f"data.mixture[{number}].path is missing; each source names a file, a folder or a data set"
            )
    parts = (
        [(f"data.mixture[{i}].", each) for i, each in enumerate(sources(data))] if data.mixture else [("data.", data)]
    )
    for prefix, each in parts:
        if each.format == "chat":
            require(f"{prefix}format=chat", "transformers")
            if tokenizer in ("bpe", "bytes"):
                raise ArgumentError(
                    f"{prefix}format=chat with data.tokenizer={tokenizer}, which has no chat template; give "
                    "data.tokenizer=FOLDER, of a Hugging Face tokenizer, or model.path"
                )
            if each.path is None:
                raise ArgumentError(f"{prefix}path=null; the standard library holds no chats, give a file or a folder")
        if each.streaming:
            require(f"{prefix}streaming=true", "datasets")
            if each.validation is None:
                raise ArgumentError(f"{prefix}streaming=true holds nothing out; give {prefix}validation=PATH")
            if each.max_bytes is not None:
                raise ArgumentError(f"data.max_bytes={each.max_bytes} with {prefix}streaming=true; leave it out")
        if (each.streaming or data.mixture) and tokenizer == "bpe":
            raise ArgumentError(
                f"data.tokenizer=bpe is trained on one text that is read as a whole; with {prefix}"
                f"{'streaming=true' if each.streaming else 'path'} give bytes or a Hugging Face folder"
            )


def _check_lora(config: Config) -> None:
    if not config.lora.rank:
        for key, value in (("alpha", config.lora.alpha), ("target_modules", config.lora.target_modules)):
            if value:
                raise ArgumentError(f"lora.{key}={value} without adapters; give lora.rank too")
        return
    require(f"lora.rank={config.lora.rank}", "peft")
    if config.model.path is None:
        raise ArgumentError(f"lora.rank={config.lora.rank} is for a model of a folder; give model.path")


def _check_optimizer(config: Config) -> None:
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.decay_steps is not None:
        if optimizer.schedule != "warmup_stable_decay":
            raise ArgumentError(
                f"optimizer.decay_steps={optimizer.decay_steps} is for optimizer.schedule=warmup_stable_decay, here it "
                f"is {optimizer.schedule}"
            )
        if config.train.epochs is None and optimizer.warmup_steps + optimizer.decay_steps > steps:
            raise ArgumentError(
                f"optimizer.decay_steps={optimizer.decay_steps} and optimizer.warmup_steps={optimizer.warmup_steps} "
                f"are more than train.steps={steps}"
            )
    if optimizer.schedule != "warmup_cosine":
        require(f"optimizer.schedule={optimizer.schedule}", "transformers")
    allowed = {"muon": ("ddp", "fsdp2"), "adamw_8bit": ("ddp",)}.get(optimizer.name)
    if allowed is not None and config.engine.name not in allowed:
        raise ArgumentError(
            f"optimizer.name={optimizer.name} with engine.name={config.engine.name}, which cuts matrices into parts; "
            f"allowed is {' and '.join(allowed)}"
        )
    if optimizer.name == "adamw_8bit":
        require("optimizer.name=adamw_8bit", "bitsandbytes", extra="8bit")


def _check_engine(config: Config, world_size: int) -> None:
    engine, default = config.engine, Config().engine
    if engine.deepspeed is not None:
        if not engine.name.startswith("zero"):
            raise ArgumentError(
                f"engine.deepspeed={engine.deepspeed} with engine.name={engine.name}; it is for zero1, zero2 and zero3"
            )
        # What "auto" stands for nobody asks a GPU yet: see _check_kernel.
        known = engine.precision != "auto" or device_type(config) == "cpu"
        precision = compute_dtype(config) if known else None
        deepspeed_json.check(engine.deepspeed, int(engine.name.removeprefix("zero")), world_size, precision)
    for key in ("reduce", "offload"):
        value = getattr(engine, key)
        if value != getattr(default, key) and engine.name != "fsdp2":
            raise ArgumentError(f"engine.{key}={value} with engine.name={engine.name}; it is for fsdp2")
    if engine.compile and engine.name not in ("ddp", "fsdp2"):
        raise ArgumentError(
            f"engine.compile=true with engine.name={engine.name}, whose weights torch.compile does not see; "
            "allowed are ddp and fsdp2"
        )
    if engine.offload and config.optimizer.name == "muon":
        raise ArgumentError(
            "engine.offload=true with optimizer.name=muon, which multiplies whole matrices of all ranks, and these do "
            "not meet on the host; allowed is adamw"
        )


def _check_logging(config: Config) -> None:
    for name in ("wandb", "trackio"):
        if getattr(config.logging, name):
            require(f"logging.{name}=true", "accelerate")
            require(f"logging.{name}=true", name, extra=None)
    first, count, steps = config.logging.profile_from, config.logging.profile_steps, config.train.steps
    if first is not None and not count:
        raise ArgumentError(f"logging.profile_from={first} without steps to record; give logging.profile_steps too")
    if first is not None and config.train.epochs is None and first + count - 1 > steps:
        raise ArgumentError(
            f"logging.profile_from={first} and logging.profile_steps={count} go beyond train.steps={steps}"
        )


def _check_own_model(model: ModelConfig) -> None:
    for name in SHAPE:
        if getattr(model, name) < 1:
            raise ArgumentError(
                f"model.{name}={getattr(model, name)}; allowed are 1 and more, or a folder in model.path"
            )
    for key, value, _ in entries(model.rope_parameters, "model.rope_parameters."):
        if value is not None:
            raise ArgumentError(f"{key}={value} is for model.path; the Llama of this recipe has model.rope_scaling")
    check_shape(model)


def _check_pretrained(config: Config) -> None:
    path, default = config.model.path, Config()
    assert path is not None
    require(f"model.path={path}", "transformers", "accelerate")
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        state = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ArgumentError(f"model.path={path}: {state}; `hf download NAME --local-dir FOLDER` makes one")
    if config.data.tokenizer in ("bpe", "bytes") and any(
        (folder / name).is_file() for name in (TOKENIZER_FILE, CONFIG_FILE)
    ):
        raise ArgumentError(
            f"data.tokenizer={config.data.tokenizer} beside model.path={path}, which knows the tokens of its own "
            "tokenizer; leave it out"
        )
    of_folder = {f"model.{key}": value for key, value, _ in entries(default.model) if not key.startswith("rope_par")}
    of_layers = {f"attention.{name}": getattr(default.attention, name) for name in OF_LAYERS}
    for key, value, _ in entries(config):
        expected = (of_folder | of_layers).get(key, value)
        if key != "model.path" and value != expected:
            rest = "config.json says it" if key in of_folder else "each layer of the model chooses its own"
            raise ArgumentError(
                f"{key}={value} beside model.path={path}: {rest}; leave it out, or take model=pretrained"
            )


def _check_kernel(config: Config) -> None:
    # On GPUs attention itself refuses: here no rank has chosen its GPU yet, and asking would start CUDA on the first.
    if device_type(config) == "cpu":
        try:
            select("cpu", compute_dtype(config), head_dim(config.model), kernel=config.attention.kernel)
        except ArgumentError as error:
            raise ArgumentError(f"attention.{error}") from error


def _check_resume(resume: str) -> None:
    if resume not in ("auto", "last_good", "never") and not is_complete(Path(resume)):
        state = f"no {MANIFEST} in it" if Path(resume).is_dir() else "no such folder"
        raise ArgumentError(
            f"checkpoint.resume={resume}: {state}; allowed are auto, last_good, never and a checkpoint's folder"
        )


def _check_weights(config: Config) -> None:
    weights = config.checkpoint.weights
    if weights is None:
        return
    if found_at(Path(weights)) is None:
        state = "no complete checkpoint in it, nor is it one" if Path(weights).is_dir() else "no such folder"
        raise ArgumentError(f"checkpoint.weights={weights}: {state}; allowed are a run's folder and a checkpoint's")
    if config.data.tokenizer is None and tokenizer_of(config) == "bpe":
        raise ArgumentError(
            f"checkpoint.weights={weights} lies in no run with a tokenizer; give that of its run as data.tokenizer"
        )


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
    exchanging, heads = config.attention.head_ranks or 1, config.model.num_attention_heads
    if degree % exchanging:
        raise ArgumentError(
            f"attention.head_ranks={exchanging} does not divide the {degree} ranks that share a sequence"
        )
    if config.model.path is None and heads % exchanging:
        raise ArgumentError(f"attention.head_ranks={exchanging} does not divide model.num_attention_heads={heads}")
    if config.attention.partition == "balanced" and train.micro_batch > 1:
        raise ArgumentError(
            "attention.partition=balanced levels the work of one packed sequence, so "
            f"train.micro_batch={train.micro_batch} must be 1 (train.global_batch may be more)"
        )
    if config.model.path is not None and train.seqlen < 2 * degree:
        raise ArgumentError(
            f"train.seqlen={train.seqlen} is less than two tokens for each of the {degree} ranks that share it, "
            "and a model of Transformers needs some on each"
        )
    if train.seqlen < degree:
        raise ArgumentError(f"train.seqlen={train.seqlen} is shorter than the {degree} ranks that share a sequence")
