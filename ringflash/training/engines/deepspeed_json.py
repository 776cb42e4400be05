"""A user's own DeepSpeed JSON, which is merged over the recipe's settings: `engine.deepspeed=path.json`.

It says how DeepSpeed does its work: where optimizer and weights lie, how large buckets are, what runs beside what. What
is trained, on how much and by which optimizer the recipe says; a JSON that says it too is refused by its key, but for
"auto", as Transformers has it, which leaves the value to the recipe.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ringflash.errors import ArgumentError

ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch",
    "optimizer": "the keys of optimizer",
    "scheduler": "optimizer.schedule",
    "gradient_clipping": "optimizer.clip",
    "fp16": "engine.precision, which knows fp32 and bf16",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "zero_optimization.stage": "engine=zero1, zero2 or zero3",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer={device: cpu}",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param={device: cpu}",
    "zero_optimization.leaf_module": "nothing: the recipe names blocks as such modules itself",
    "activation_checkpointing": "engine.memory",
    "checkpoint": "the keys of checkpoint",
    "load_universal": "checkpoint.resume",
    "sequence_parallel_size": "train.sequence_degree",
    "data_parallel_size": "train.sequence_degree",
    "gradient_allreduce_op": "nothing: the recipe's loss is one for which the mean is right",
    "zero_allow_untested_optimizer": "nothing: the recipe's AdamW is torch's",
    "zero_force_ds_cpu_optimizer": "nothing: the recipe's AdamW is torch's, on the host too",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "csv_monitor": "nothing: the run's folder holds metrics.jsonl",
    "comet": "logging.wandb or logging.trackio",
}
"""Keys that contradict the recipe, and what to set instead."""

ALLOWED = {
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "zero_optimization",
}
"""Keys that are handed on."""

ALLOWED_OF_ZERO = {
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "zero_hpz_partition_size",
    "memory_efficient_linear",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
}
"""Keys of `zero_optimization` that are handed on."""

OF_HOST = {
    "offload_optimizer": {"device", "pin_memory", "buffer_count", "fast_init"},
    "offload_param": {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"},
}
"""Keys of what lies in host memory that are handed on."""


def read(path: str) -> dict[str, Any]:
    """What a file says, less what it leaves to the recipe.

    Raises:
        ArgumentError: there is no such file, or no JSON object in it, or one that names a key twice.
    """
    try:
        found = json.loads(Path(path).expanduser().read_bytes(), object_pairs_hook=_each_key_once)
    except (OSError, ValueError) as error:
        allowed = "allowed is a file that holds a JSON object"
        raise ArgumentError(f"engine.deepspeed={path}: cannot read it: {error}; {allowed}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"engine.deepspeed={path} holds no JSON object")
    return _without_auto(found)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice} is there twice")
    return found


def _without_auto(said: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in said.items()}
    # An object in which everything was "auto" says nothing either.
    return {key: value for key, value in inner.items() if value != "auto" and (value != {} or said[key] == {})}


def check(path: str, stage: int, ranks: int, precision: torch.dtype | None) -> None:
    """Raise ArgumentError, naming file and key, for what contradicts the recipe or is not known here.

    Args:
        path: of the file.
        stage: ZeRO's.
        ranks: of the run.
        precision: dtype of the run's activations; None where nobody knows yet.
    """
    said = read(path)
    same = {
        "fp16.enabled": False,
        "amp.enabled": False,
        "torch_autocast.enabled": False,
        "bf16.enabled": None if precision is None else precision == torch.bfloat16,
        "zero_optimization.stage": stage,
        "gradient_allreduce_op": "mean",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in _leaves(said):
        if key in same and value == same[key]:
            continue  # it is what the recipe says
        if problem := _problem(key, value, stage, ranks):
            raise ArgumentError(f"engine.deepspeed={path}: {key}={json.dumps(value)}: {problem}")


def merged(ours: dict[str, Any], path: str | None) -> dict[str, Any]:
    """The recipe's settings with those of a file, which has passed `check`, in their place."""
    if path is None:
        return ours
    # What says the same as the recipe, or else is for other settings of it, is in `ours` already.
    said = {key: value for key, value in read(path).items() if key in ALLOWED}
    of_zero = ours["zero_optimization"] | said.pop("zero_optimization", {})
    offloads = {"zero_force_ds_cpu_optimizer": False} if "offload_optimizer" in of_zero else {}
    return ours | offloads | said | {"zero_optimization": of_zero}


def _leaves(said: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """("zero_optimization.stage", 3) and so on; of an object that is not looked into, the whole."""
    of_zero = {"zero_optimization", *(f"zero_optimization.{key}" for key in OF_HOST)}
    looked_into = of_zero | {"fp16", "bf16", "amp", "torch_autocast"}

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in looked_into and isinstance(value, dict):
                yield from walk(value, f"{name}.")
            else:
                yield name, value

    return walk(said, "")


def _problem(key: str, value: Any, stage: int, ranks: int) -> str | None:
    """What is wrong with a key, if anything is."""
    instead = ELSEWHERE.get(key) or ELSEWHERE.get(key.split(".")[0])
    if instead is not None:
        return f"it contradicts the recipe; set {instead}"
    group, _, own = key.rpartition(".")
    part = group.removeprefix("zero_optimization.")
    if part in OF_HOST:
        return _problem_of_host(part, own, value, stage)
    allowed = ALLOWED_OF_ZERO if group else ALLOWED - {"zero_optimization"}
    if own in OF_HOST or key == "zero_optimization":
        return "it has to be an object"
    if own not in allowed:
        return f"the recipe hands no such key to DeepSpeed; allowed here are {', '.join(sorted(allowed))}"
    if own == "zero_hpz_partition_size" and value != 1:
        if stage != 3:
            return "it is for engine=zero3"
        if not isinstance(value, int) or value < 1 or ranks % value:
            return f"it has to divide the {ranks} ranks"
    return None


def _problem_of_host(part: str, own: str, value: Any, stage: int) -> str | None:
    if part == "offload_param" and stage != 3:
        return "weights are divided, and can lie on the host, with engine=zero3"
    if own == "device":
        return None if value in ("cpu", "none") else "allowed are cpu and none"
    if own not in OF_HOST[part]:
        return f"the recipe hands no such key to DeepSpeed; allowed here are {', '.join(sorted(OF_HOST[part]))}"
    return None
