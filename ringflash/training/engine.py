"""How parameters, gradients and optimizer state live on the ranks: plain DDP, or DeepSpeed ZeRO 1, 2 and 3.

Both treat all ranks, data and sequence alike, as one data-parallel group. A rank's gradient is that of
`local loss sum / valid tokens of the whole step * ranks`, and the engine averages over ranks: the result is the
gradient of the mean loss over all tokens of the step, whatever the sharding, the accumulation and the engine.

An engine exports its state as whole fp32 tensors by parameter name, one at a time, and imports the same, so a
checkpoint of any engine on any number of ranks continues on any other.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringflash.configs.schema import EngineConfig, OptimizerConfig
from ringflash.training.loss import valid_tokens
from ringflash.training.materialise import Fill, materialise
from ringflash.training.model import Transformer
from ringflash.training.optimizer import MOMENTS, adam_state, adamw

Read = Callable[[str], Tensor]
"""Tensor of a checkpoint by name: `weight/<parameter>`, `exp_avg/<parameter>`, `exp_avg_sq/<parameter>`."""


def create_engine(
    model: Transformer,
    device: torch.device,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    accumulation: int = 1,
    state: Read | None = None,
    step: int = 0,
) -> Engine:
    """Give a model memory and weights, and spread both over the ranks.

    Args:
        model: built on the meta device.
        device: this rank's.
        config: which engine.
        optimizer: AdamW's settings.
        accumulation: micro-batches of one step.
        state: reads a checkpoint's tensors; None to start from the model's initial weights.
        step: optimizer steps that the checkpoint has behind it.
    """
    shapes = parameter_shapes(model)

    def fill(name: str, weight: Tensor) -> None:
        if state is None:
            model.initialise(name, weight)
        else:
            weight.copy_(state(f"weight/{name}"))

    if config.name == "ddp":
        materialise(model, device, fill)
        engine = DdpEngine(model, optimizer)
    else:
        stage = int(config.name.removeprefix("zero"))
        engine = ZeroEngine(model, device, fill, stage, optimizer, accumulation)
    engine.shapes = shapes
    if state is not None:
        engine.load(state, step)
    return engine


class Engine(ABC):
    """A model with its optimizer, spread over the ranks."""

    model: Transformer
    shapes: dict[str, tuple[int, ...]]
    """Shape of each parameter, in the order of `tensors`."""

    def train_step(
        self, batches: Sequence[dict], lr: float, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step over this rank's shards of its micro-batches.

        Args:
            batches: arguments of the model for each micro-batch, on its device.
            lr: learning rate.
            stop: whether this rank wants the run to stop; asked at the step's end.

        Returns:
            Mean loss per token over all ranks, the gradient's norm before clipping, and how many ranks want to stop;
            scalars on the device.
        """
        self.model.train()
        valid = torch.stack([valid_tokens(batch["labels"]) for batch in batches]).sum()
        dist.all_reduce(valid)
        # A step whose every token is masked has no gradient; without the clamp it would have NaN.
        share = 1 / valid.clamp(min=1)
        total = torch.zeros((), device=valid.device)
        for index, batch in enumerate(batches):
            total += self.accumulate(batch, share * dist.get_world_size(), last=index == len(batches) - 1)
        norm = self.update(lr)
        sums = torch.stack([total, torch.full_like(total, float(stop()))])
        dist.all_reduce(sums)
        return sums[0] * share, norm, sums[1]

    @torch.no_grad()
    def evaluate(self, batch: dict) -> Tensor:
        """Cross entropy (B, T) fp32 of each token of this rank's shard; 0 where there is no label."""
        self.model.eval()
        return self.wrapped(**batch, per_token=True)

    @property
    @abstractmethod
    def wrapped(self) -> nn.Module:
        """What to call instead of the model."""

    @abstractmethod
    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """Add the gradient of factor * loss sum; returns the loss sum, detached."""

    @abstractmethod
    def update(self, lr: float) -> Tensor:
        """Clip, step, clear the gradients; returns their norm before clipping."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight/<parameter>" or "<moment>/<parameter>", whole fp32 tensor); a collective on every rank."""

    @abstractmethod
    def load(self, state: Read, step: int) -> None:
        """Continue from the master weights and moments of a checkpoint; the model's own weights are there already."""


class DdpEngine(Engine):
    """torch's DistributedDataParallel: everything whole on every rank, fp32 weights."""

    def __init__(self, model: Transformer, config: OptimizerConfig) -> None:
        self.model = model
        self.clip = config.clip
        # Without device_ids, which would move the host's document boundaries to the GPU on every step.
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = adamw(model, config)

    @property
    def wrapped(self) -> nn.Module:
        """The DDP module."""
        return self._wrapped

    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """See Engine; ranks exchange gradients with the last micro-batch only."""
        self._wrapped.require_backward_grad_sync = last
        loss = self._wrapped(**batch)
        (loss * factor).backward()
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine."""
        for name, weight in self.model.named_parameters():
            yield f"weight/{name}", weight.detach()
            for moment in MOMENTS:
                yield f"{moment}/{name}", self.optimizer.state[weight][moment]

    def load(self, state: Read, step: int) -> None:
        """See Engine."""
        for name, weight in self.model.named_parameters():
            kept = adam_state(weight.detach(), step)
            for moment in MOMENTS:
                kept[moment].copy_(state(f"{moment}/{name}"))
            self.optimizer.state[weight] = kept


class ZeroEngine(Engine):
    """DeepSpeed ZeRO; optimizer state (1), also gradients (2), also parameters (3) divided among all ranks."""

    def __init__(
        self,
        model: Transformer,
        device: torch.device,
        fill: Fill,
        stage: int,
        config: OptimizerConfig,
        accumulation: int,
    ) -> None:
        deepspeed = import_deepspeed(device)
        self.model, self.stage = model, stage
        self._safe = deepspeed.utils
        settings = _deepspeed_config(model, stage, config, accumulation)

        def divide(module: nn.Module) -> None:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)

        with redirect_stdout(StringIO()):  # it prints how much memory it uses
            if stage == 3:  # never whole on a rank, and in the dtype that the others are cast to
                materialise(model, device, fill, model.dtype, divide)
            else:
                materialise(model, device, fill)
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=model, optimizer=adamw(model, config), config=settings, dist_init_required=False
            )
        # The optimizer that DeepSpeed wraps makes its state in its first step, group by group, and DeepSpeed finds
        # the first group's only; made here, the state of every group is found, and a checkpoint has a place to go.
        for master in self._masters():
            self._zero.optimizer.state[master] = adam_state(master.detach(), 0)
        if stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

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

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine; gathered from all ranks one by one."""
        for name, weight in self.model.named_parameters():
            yield f"weight/{name}", self._safe.safe_get_full_fp32_param(weight)
            for moment in MOMENTS:
                yield f"{moment}/{name}", self._safe.safe_get_full_optimizer_state(weight, moment)

    def load(self, state: Read, step: int) -> None:
        """See Engine; each rank keeps its part."""
        for master in self._masters():
            self._zero.optimizer.state[master]["step"].fill_(step)
        for name, weight in self.model.named_parameters():
            self._set(weight, state(f"weight/{name}"), None)
            for moment in MOMENTS:
                self._set(weight, state(f"{moment}/{name}"), moment)

    def _set(self, weight: nn.Parameter, whole: Tensor, moment: str | None) -> None:
        whole = whole.to(device=weight.device, dtype=torch.float32)
        if self.stage < 3:
            names = () if moment is None else (moment,)
            setter = self._safe.safe_set_full_fp32_param if moment is None else self._safe.safe_set_full_optimizer_state
            setter(weight, whole, *names)
            return
        # DeepSpeed's own division of a whole tensor fails where its size is no multiple of the ranks.
        part = weight.ds_tensor.numel()
        padded = nn.functional.pad(whole.flatten(), (0, part * dist.get_world_size() - whole.numel()))
        mine = padded[part * dist.get_rank() :][:part]
        if moment is None:
            self._safe.safe_set_local_fp32_param(weight, mine)
        else:
            self._safe.safe_set_local_optimizer_state(weight, mine, moment)

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one tensor for each parameter group (stage 3: for each sub-group)."""
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(self._zero, attribute):
                return getattr(self._zero, attribute)
        raise AttributeError(f"{type(self._zero).__name__} of this DeepSpeed version keeps its fp32 weights elsewhere")


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a model that no engine has divided."""
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def import_deepspeed(device: torch.device) -> object:
    """DeepSpeed, kept from compiling an operator for CPU communication that takes minutes and needs a compiler."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # torchrun sets it; DeepSpeed refuses to be without
    os.environ["DS_ACCELERATOR"] = device.type  # it would take a GPU that is there even if device=cpu
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    # It calls collectives by names that torch has deprecated; each call would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    return deepspeed


def _deepspeed_config(model: Transformer, stage: int, config: OptimizerConfig, accumulation: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
