"""What `RingTrainer` refuses of a Trainer's arguments, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import ParallelismConfig
from transformers import Trainer

from ringflash.errors import ArgumentError


def checked_size(size: Any, config: ParallelismConfig | None, world: int) -> int:
    """How many ranks share a sequence."""
    meant = config.cp_size if config is not None and config.cp_enabled else None
    if size is not None and meant is not None and size != meant:
        raise ArgumentError(
            f"sequence_size={size!r}, and ParallelismConfig has cp_size={meant}; allowed is one of them"
        )
    size = meant if size is None else size
    size = world if size is None else size
    if type(size) is not int or size < 1 or world % size:
        raise ArgumentError(
            f"sequence_size={size!r} on {world} ranks; allowed are {[n for n in range(1, world + 1) if world % n == 0]}"
        )
    return size


def check_supported(trainer: Trainer, mixin: type) -> None:
    """Raise ArgumentError where a Trainer would take the tokens of one rank for the whole batch.

    Args:
        trainer: of a class derived from `mixin`.
        mixin: the classes behind it are given batches that it shards.
    """
    size = trainer.get_cp_size()
    if size == 1:
        return
    for name, value, allowed in _unsupported(trainer):
        raise ArgumentError(f"{name}={value!r} with sequence_size={size}; allowed is {allowed}")
    classes = type(trainer).__mro__
    for owner in classes[classes.index(mixin) + 1 :]:
        if "compute_loss" in vars(owner) and owner.__name__ not in ("Trainer", "SFTTrainer"):
            raise ArgumentError(
                f"{owner.__name__} computes its loss itself, of whole sequences; allowed with sequence_size={size} are "
                f"Trainer, SFTTrainer, and what leaves compute_loss to them. Name a class before {mixin.__name__} if "
                "it only changes what super().compute_loss returns"
            )


def _unsupported(trainer: Trainer) -> Iterator[tuple[str, object, str]]:
    """Arguments that cannot be honoured: name, value and what is allowed."""
    args = trainer.args
    if args.label_smoothing_factor != 0:
        yield (
            "label_smoothing_factor",
            args.label_smoothing_factor,
            "0: Trainer shifts labels within one rank's tokens. model.loss_function may smooth; it gets shift_labels",
        )
    if trainer.compute_loss_func is not None:
        yield (
            "compute_loss_func",
            trainer.compute_loss_func,
            "None: it would get one rank's logits with the labels of all. Set model.loss_function, which gets logits, "
            "shift_labels and num_items_in_batch that belong together",
        )
    if trainer.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha", trainer.neftune_noise_alpha, "None: the noise depends on a sequence's length"
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        yield "train_sampling_strategy", args.train_sampling_strategy, "any that leaves batches to the loader"
    liger = args.liger_kernel_config or {}
    if args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
        yield (
            "liger_kernel_config",
            args.liger_kernel_config,
            "one with fused_linear_cross_entropy=False; use trainer.sequence.fuse_loss()",
        )
    if getattr(trainer, "aux_loss_enabled", False):
        yield (
            "router_aux_loss_coef",
            getattr(args, "router_aux_loss_coef", None),
            "0.0: the loss that balances experts is a function of the whole batch",
        )
    if trainer.get_tp_size() > 1:
        yield "tp_size", trainer.get_tp_size(), "1"
    if trainer.get_sp_size() > 1:
        yield "sp_size", trainer.get_sp_size(), "1: DeepSpeed would shard sequences as well"
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    parts = 1 if deepspeed is None else deepspeed.config.get("sequence_parallel_size", 1)
    if parts > 1:
        yield "sequence_parallel_size", parts, "1 in DeepSpeed's configuration: it would average over fewer ranks"
