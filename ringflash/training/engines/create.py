"""Choosing an engine, and giving a model its memory and weights in it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringflash.configs.schema import EngineConfig, OptimizerConfig
from ringflash.training.engines.base import Engine, Read
from ringflash.training.engines.ddp import DdpEngine
from ringflash.training.engines.fsdp2 import Fsdp2Engine
from ringflash.training.engines.materialise import materialise
from ringflash.training.engines.optimizer import trained
from ringflash.training.engines.zero import ZeroEngine
from ringflash.training.estimate.lasting import held, weights_of
from ringflash.training.memory.available import share_of_host
from ringflash.training.model.decoder import Decoder

DIVIDE_WEIGHTS = ("fsdp2", "zero3")
"""Engines under which no rank ever holds the whole model."""


def create_engine(
    model: Decoder,
    device: torch.device,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    accumulation: int = 1,
    state: Read | None = None,
    step: int = 0,
    weights: Read | None = None,
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
        weights: reads another run's weights, to start anew from.
    """
    shapes = parameter_shapes(model)
    if config.compile:
        model.compile_blocks()
    model.keep(config.memory, device, _host_bytes(model, config, optimizer))

    read = state or weights

    def fill(name: str, weight: Tensor) -> None:
        if read is None or name not in shapes:
            model.initialise(name, weight)
        elif config.name in DIVIDE_WEIGHTS:
            weight.zero_()  # each rank reads its part once it has one
        else:
            weight.copy_(read(f"weight/{name}"))

    if config.name == "ddp":
        materialise(model, device, fill, frozen=model.dtype)
        engine: Engine = DdpEngine(model, optimizer)
    elif config.name == "fsdp2":
        engine = Fsdp2Engine(model, device, fill, config, optimizer)
    else:
        stage = int(config.name.removeprefix("zero"))
        engine = ZeroEngine(model, device, fill, stage, optimizer, accumulation, config.deepspeed)
    engine.shapes = shapes
    if read is not None:
        engine.load(read, step, moments=state is not None)
    return engine


def _host_bytes(model: Decoder, config: EngineConfig, optimizer: OptimizerConfig) -> int:
    """Host memory for blocks: of what is free, not what the engine is to have there."""
    if config.host_gib is not None:
        return int(config.host_gib * 2**30)
    engine = held(config, weights_of(model), dist.get_world_size(), optimizer.name)
    return share_of_host(sum(engine.host.values()))


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that is trained, of a model that no engine has divided."""
    return {name: tuple(weight.shape) for name, weight in trained(model)}
