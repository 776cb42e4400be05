"""What a run goes on from, or starts from: a checkpoint that was found good, and fits.

Everything in here is a collective.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ringflash.configs.schema import AttentionConfig, Config, RopeScalingConfig
from ringflash.errors import ArgumentError, CheckpointError
from ringflash.training.checkpoint.files import found_at, newest, step_of
from ringflash.training.checkpoint.reading import Checkpoint, last_good
from ringflash.training.corpus.tokenizer import Tokenizer, fingerprint
from ringflash.training.engines.create import parameter_shapes
from ringflash.training.model.decoder import Decoder
from ringflash.training.ranks import from_rank_0

BESIDE = {"path", "transformers_version", "dtype", "use_cache"}
"""What a model's description holds beside how it computes."""


def to_go_on_from(config: Config, folder: Path, model: Decoder) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a run goes on from, if any, and what was wrong with newer ones that were set aside.

    Args:
        config: of the run.
        folder: the run's.
        model: which no engine has divided.

    Raises:
        CheckpointError: it is damaged, of weights alone, or of another model or optimizer.
        ArgumentError: the run's folder holds a later step.
    """
    found, set_aside = _found(config.checkpoint.resume, folder)
    if found is not None:
        _check_goes_on(found)
        _check_same_model(found, model)
        _check_same_settings(found, model, config.attention)
        _check_same_optimizer(found, config.optimizer.name)
    return found, set_aside


def to_start_from(config: Config, model: Decoder, tokenizer: Tokenizer) -> Checkpoint | None:
    """The checkpoint of another run whose weights this one begins with, if any.

    Args:
        config: of the run.
        model: which no engine has divided.
        tokenizer: of the run.

    Raises:
        CheckpointError: it is damaged, or of another model or other tokens.
    """
    weights = config.checkpoint.weights
    path = None if weights is None else from_rank_0(found_at(Path(weights)))
    if path is None:
        return None
    found = Checkpoint(path, weights_alone=True)
    _check_same_model(found, model)
    if found.state.get("tokenizer") not in (None, fingerprint(tokenizer)):
        raise CheckpointError(
            f"checkpoint.weights={weights} was trained with other tokens; leave data.tokenizer out, or give the "
            "tokenizer of that run"
        )
    return found


def _found(resume: str, folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """What `checkpoint.resume` asks for."""
    root = folder / "checkpoints"
    if resume == "last_good":
        return last_good(root)
    there = from_rank_0(newest(root))
    path = {"auto": there, "never": None}.get(resume, Path(resume))
    try:
        found = None if path is None else Checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; checkpoint.resume=last_good goes on from the one before it") from error
    step = 0 if found is None else found.state["step"]
    if there is not None and step_of(there) > step:
        raise ArgumentError(
            f"checkpoint.resume={resume} starts at step {step}, but run_dir={folder} already holds {there.name}; give "
            "another run_dir"
        )
    return found, []


def _check_goes_on(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if it lacks what the optimizer keeps."""
    if checkpoint.only_weights:
        raise CheckpointError(
            f"{checkpoint.path} holds weights alone (checkpoint.only_weights=true), from which no run goes on; "
            f"checkpoint.weights={checkpoint.path} starts a new one from them, in another run_dir"
        )


def _check_same_optimizer(checkpoint: Checkpoint, here: str) -> None:
    there = checkpoint.state["config"]["optimizer"].get("name", "adamw")
    if there != here:
        raise CheckpointError(
            f"{checkpoint.path} holds what optimizer.name={there} keeps, here it is {here}; checkpoint.weights=PATH "
            "starts a new run from its weights alone"
        )


def _check_same_model(checkpoint: Checkpoint, model: Decoder) -> None:
    """Raise CheckpointError for other parameters, and for adapters upon other weights, or otherwise scaled."""
    there, here = (about.get("lora") or {} for about in (checkpoint.state["model"], model.description()))
    if bool(there) != bool(here):
        state = (
            f"adapters alone, for lora.rank={there['rank']}" if there else f"no adapters for lora.rank={here['rank']}"
        )
        raise CheckpointError(
            f"{checkpoint.path} holds {state}; `python -m ringflash.export` makes a folder of it, for model.path"
        )
    for name, value in here.items():
        if there[name] != value:
            what = "weights of model.path" if name == "weights" else f"lora.{name}"
            raise CheckpointError(f"{checkpoint.path}: its adapters had other {what}: {there[name]}, here {value}")
    checkpoint.check_shapes(parameter_shapes(model))


def _check_same_settings(checkpoint: Checkpoint, model: Decoder, attention: AttentionConfig) -> None:
    """Raise CheckpointError if the same weights would go on in a model that computes something else with them."""
    there = _settings(checkpoint.state["model"]) | _mask(checkpoint.state["config"]["attention"])
    here = _settings(model.description()) | _mask(vars(attention))
    for name in there.keys() & here.keys():
        if there[name] != here[name]:
            raise CheckpointError(
                f"{checkpoint.path} is of another model: {name} is {there[name]} there and {here[name]} here; "
                "checkpoint.weights=PATH starts a new run from its weights alone"
            )


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    """What a description says of how a model computes, as it is in a checkpoint."""
    about = json.loads(json.dumps(about))
    if "rope_scaling" in about:  # an earlier version may not have known all of its keys
        about["rope_scaling"] = vars(RopeScalingConfig(**about["rope_scaling"]))
    return {name: value for name, value in about.get("huggingface", about).items() if name not in BESIDE}


def _mask(attention: dict[str, Any]) -> dict[str, Any]:
    names = {"causal": (), "sliding_window": ("window", "sink"), "chunked": ("chunk",)}[attention["mask"]]
    return {f"attention.{name}": attention[name] for name in ("mask", *names)}
