"""DeepSpeed's ZeRO 1, 2 and 3, with what each rank holds of its state as fp32 tensors by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO

import torch
from torch import Tensor, nn

from ringflash.configs.schema import OptimizerConfig
from ringflash.deepspeed import import_deepspeed
from ringflash.deepspeed_private import (
    cast_own_part,
    copies_group,
    link_optimizer_state,
    master_weights,
    optimizer_state,
    own_part,
)
from ringflash.errors import ArgumentError
from ringflash.training.engines import deepspeed_json
from ringflash.training.engines.base import Engine, Piece, Read
from ringflash.training.engines.materialise import Fill, materialise
from ringflash.training.engines.optimizer import MOMENTS, adam_state, adamw, trained
from ringflash.training.engines.room import bucket, gathered
from ringflash.training.model.decoder import Decoder


class ZeroEngine(Engine):
    """DeepSpeed ZeRO; optimizer state (1), also gradients (2), also parameters (3) divided among all ranks."""

    def __init__(
        self,
        model: Decoder,
        device: torch.device,
        fill: Fill,
        stage: int,
        config: OptimizerConfig,
        accumulation: int,
        path: str | None = None,
    ) -> None:
        """Divide a model that is on the meta device.

        Args:
            model: on the meta device.
            device: this rank's.
            fill: fills a weight.
            stage: 1, 2 or 3.
            config: AdamW's settings.
            accumulation: micro-batches of a step.
            path: of the user's own DeepSpeed JSON, checked.

        Raises:
            ArgumentError: a value in that JSON that DeepSpeed refuses.
        """
        deepspeed = import_deepspeed(device)
        self.model, self.stage = model, stage
        settings = deepspeed_json.merged(_deepspeed_config(model, stage, config, accumulation), path)
        _check_values(settings, path)

        copies = settings["zero_optimization"].get("zero_hpz_partition_size", 1)
        # Left to itself, Init would make the group anew for each module.
        group = copies_group(deepspeed.utils.groups, copies) if copies > 1 else None

        def divide(module: nn.Module) -> None:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, zero_param_parallel_group=group)

        with redirect_stdout(StringIO()):  # it prints how much memory it uses
            if stage == 3:  # never whole on a rank, and in the dtype that the others are cast to
                for block in model.whole_blocks():
                    deepspeed.utils.set_z3_leaf_module(block, True)
                materialise(model, device, fill, model.dtype, divide)
            else:
                materialise(model, device, fill)
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=model, optimizer=adamw(model, config), config=settings, dist_init_required=False
            )
        # The optimizer that DeepSpeed wraps makes its state in its first step, group by group, and DeepSpeed finds
        # the first group's only; made here, the state of every group is found, and a checkpoint has a place to go.
        for master in master_weights(self._zero):
            optimizer_state(self._zero)[master] = adam_state(master.detach(), 0)
        if stage < 3:
            link_optimizer_state(self._zero)

    @property
    def wrapped(self) -> nn.Module:
        """The DeepSpeed engine."""
        return self._engine

    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """See Engine; DeepSpeed counts micro-batches itself."""
        loss = self._engine(**batch)
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        if not last:
            self._engine.step()
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def pieces(self) -> Iterator[Piece]:
        """See Engine; what a rank holds it alone holds."""
        for name, start, part in self._held(("weight", *MOMENTS)):
            yield Piece(name, start, len(part), lambda part=part: part)

    def load(self, read: Read, step: int, moments: bool) -> None:
        """See Engine; weights that stage 3 divides are read here, in fp32 as those that are trained are kept."""
        kinds = ("weight", *MOMENTS) if moments else ("weight",)
        for master in master_weights(self._zero):
            optimizer_state(self._zero)[master]["step"].fill_(step)
        for name, start, part in self._held(kinds):
            part.copy_(read(name, start, start + len(part)))
        if self.stage == 3:
            for _, weight in trained(self.model):
                cast_own_part(weight)

    def _held(self, kinds: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
        """Views of what this rank holds of the state: name, first element of the whole tensor, flat fp32 tensor."""
        for name, weight in trained(self.model):
            for kind in kinds:
                held = own_part(weight, None if kind == "weight" else kind)
                if held is not None:
                    yield f"{kind}/{name}", *held


def _deepspeed_config(model: Decoder, stage: int, config: OptimizerConfig, accumulation: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **_room(model, stage)},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _room(model: Decoder, stage: int) -> dict[str, int]:
    """How many weights may lie in buffers."""
    sizes = [[weight.numel() for weight in part.parameters()] for part in model.parts()]
    everything = [weight.numel() for weight in model.parameters()]
    # A block has several weights, an embedding and a head have one.
    blocks = [size for size in sizes if len(size) > 1] or [everything]
    found = {"reduce_bucket_size": bucket(max(map(max, blocks)), sum(everything))}
    if stage < 3:
        return found
    block = max(map(sum, blocks))
    # A block is gathered while the one before it computes.
    ahead = max((sum(weight.numel() for weight in each.parameters()) for each in model.whole_blocks()), default=block)
    return found | {
        "stage3_prefetch_bucket_size": ahead,
        "stage3_max_live_parameters": gathered(block, max(everything)),
        "stage3_max_reuse_distance": block,  # what is computed again stays for its backward pass
    }


def _check_values(settings: dict, path: str | None) -> None:
    """Raise ArgumentError for a value that DeepSpeed refuses; keys are known by now."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ArgumentError(f"engine.deepspeed={path}: zero_optimization: {said}") from error
