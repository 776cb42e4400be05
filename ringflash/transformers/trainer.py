"""`RingTrainer`: Hugging Face's Trainer, and those made from it, with sequences that lie on several ranks.

class Trainer(RingTrainer, SFTTrainer): ...                    # or RingTrainer itself, for transformers.Trainer
trainer = Trainer(model, args=SFTConfig(..., packing=True), train_dataset=dataset, sequence_size=8)

A Trainer counts the targets of a step over all ranks, divides by that, and multiplies by the number of ranks for
engines that average gradients. That stays right where each rank has a part of the targets. So what is left to do is to
give all ranks of a group one batch, to count it once, and to shard it where the model is called.

Legend: B sequences; S tokens of one sequence over all ranks, s of them on this rank.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch import Tensor, nn
from transformers import Trainer

from ringflash.errors import ArgumentError
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.sharding import Sharding
from ringflash.transformers.loaders import share_batches
from ringflash.transformers.sequence_parallel import SequenceParallel
from ringflash.transformers.trainer_arguments import check_supported, checked_size


class RingTrainer(Trainer):
    """A Trainer whose ranks share sequences; name it before the Trainer that it is to change.

    Losses, gradients, weights and logs are those of as many devices as there are groups.

    Args:
        arguments: of the Trainer.
        sequence_size: how many consecutive ranks share a sequence. If None, `cp_size` of the ParallelismConfig in the
            training arguments or of `accelerate launch`, and all ranks without one.
        named: of the Trainer.

    Attributes:
        sequence: the `SequenceParallel`; `sequence.fuse_loss()` before training, and `sequence.alone()` around calls of
            the model in callbacks, as `model.generate`.

    Raises:
        ArgumentError: an argument would give something else than one device computes.
    """

    sequence: SequenceParallel

    def __init__(self, *arguments: Any, sequence_size: int | None = None, **named: Any) -> None:
        self._given_size = sequence_size
        self._group: Any = None
        super().__init__(*arguments, **named)
        check_supported(self, RingTrainer)
        assert isinstance(self.model, nn.Module)
        self.sequence = SequenceParallel(self.model, self._group or ONE_DEVICE)
        self._tp_size = self._sequence_size  # by which SFTTrainer divides tokens that it has counted on every rank

    def create_accelerator_and_postprocess(self) -> None:
        """Has batches shared, and hides a cp dimension, for which accelerate would shard as well or refuse the rest."""
        given = config = self.args.parallelism_config
        if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
            config = ParallelismConfig()  # of what `accelerate launch` was told, as accelerate makes it
        self._sequence_size = checked_size(self._given_size, config, self.args.world_size)
        if config is not None:
            ranks = (config.dp_shard_size or 1) * (config.cp_size or 1)  # FSDP shards weights over both
            self.args.parallelism_config = replace(config, dp_shard_size=ranks, cp_size=1, cp_handler=None)
        super().create_accelerator_and_postprocess()
        self.args.parallelism_config = given
        if self._sequence_size > 1 and self._group is None:
            self._group = dist.new_subgroups(group_size=self._sequence_size)[0]
        share_batches(self.accelerator, self._group)
        self.gather_function = functools.partial(  # Trainer has taken the method that was there before
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Prepares models that are made anew for a run, which is any but the first, that `__init__` prepares."""
        model = super().call_model_init(trial)
        if hasattr(self, "sequence"):
            self.sequence = SequenceParallel(model, self.sequence.group)
        return model

    def get_cp_size(self) -> int:
        """Trainer divides by it where it needs the number of devices that have samples of their own."""
        return self._sequence_size

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Tensor | None:
        """Counts the targets that `shard` makes, none of which leads into another document, once for a group."""
        if not batch_samples or "labels" not in batch_samples[0] or not self.model_accepts_loss_kwargs:
            return None
        items = torch.stack([self.sequence.count_targets(batch) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices:
            items = self.accelerator.gather(items).sum()
        return items / self._sequence_size

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Shards what the model is called with."""
        if num_items_in_batch is None:  # SFTTrainer evaluates so, and takes the mean over its own tokens
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        model = model if isinstance(model, _Sharded) else _Sharded(model, self.sequence)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Returns the loss of the whole batch: Trainer logs means over ranks, but ends with what rank 0 has."""
        return self.sequence.reported(super().training_step(*arguments, **named))

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Shards as well, returns whole predictions, and lets Trainers that generate here do so on each rank alone."""
        sharded = _Sharded(model, self.sequence)
        with self.sequence.alone():
            loss, logits, labels = super().prediction_step(sharded, inputs, prediction_loss_only, ignore_keys)
        loss = None if loss is None else self.sequence.reported(loss)
        return loss, sharded.whole(logits), labels

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Counts the tokens of a batch once for a group."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._sequence_size

    def floating_point_ops(self, inputs: Any) -> int:
        """This rank's part of a batch's."""
        return super().floating_point_ops(inputs) // self._sequence_size


class _Sharded(nn.Module):
    """What a Trainer calls with whole batches, in the place of its model.

    Args:
        model: also in wrappers.
        sequence: shards the batches.
    """

    def __init__(self, model: nn.Module, sequence: SequenceParallel) -> None:
        super().__init__()
        self._model, self._sequence = model, sequence
        self._sharding: Sharding | None = None

    def forward(self, **inputs: Any) -> Any:
        """Outputs of the model for this rank's tokens."""
        items = inputs.pop("num_items_in_batch", None)
        batch = self._sequence.shard(inputs)
        if items is not None:
            batch["num_items_in_batch"] = items  # Trainer multiplies by the number of ranks itself
        if inputs.get("fused_lm_head"):
            batch.pop("labels")  # TRL's output head scores shift_labels, by no loss function of the model
        self._sharding = batch["sharding"]
        return self._model(**batch)

    def whole(self, outputs: Any) -> Any:
        """Outputs of the last call, (B, s, ...), over all ranks, (B, S, ...)."""
        if outputs is None or self._sharding is None:
            return outputs
        if isinstance(outputs, dict):
            return {name: self.whole(x) for name, x in outputs.items()}
        if isinstance(outputs, tuple | list):
            return type(outputs)(self.whole(x) for x in outputs)
        if tuple(outputs.shape[:2]) != (self._sharding.batch, self._sharding.tokens):
            raise ArgumentError(
                f"the model returns a tensor {tuple(outputs.shape)} beside logits, which cannot be put together from "
                "the ranks; name it in ignore_keys, or let the model return logits alone"
            )
        return self._sharding.unshard(outputs, 1)
