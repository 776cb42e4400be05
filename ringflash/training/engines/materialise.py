"""Memory and values for the parameters of a model that was built on torch's meta device, which has neither.

A model that no GPU can hold whole is made one parameter at a time: each rank fills it, keeps its share, and lets go of
the rest before the next. Values depend on nothing but a parameter's name, so all engines start from the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Fill = Callable[[str, Tensor], object]
"""Fills a parameter, given its name, in place."""

Part = Callable[[nn.Parameter, Tensor], Tensor]
"""What a rank keeps of a parameter, given the one on the meta device, and its value."""


@torch.no_grad()
def materialise(
    model: nn.Module,
    device: torch.device,
    fill: Fill,
    dtype: torch.dtype = torch.float32,
    divide: Callable[[nn.Module], object] | None = None,
    frozen: torch.dtype | None = None,
    part: Part = lambda weight, value: value,
) -> None:
    """Replace the parameters of a model on the meta device by real ones, and put its buffers beside them.

    Args:
        model: may share a parameter between modules; it stays shared. Buffers have their values already.
        device: where parameters go.
        fill: called once for each parameter, in fp32, by the first of its names.
        dtype: parameters are cast to it once filled.
        frozen: the dtype of those that are not trained; None for the same.
        divide: called with each module that has parameters of its own, as soon as they are there.
        part: what of a parameter stays.
    """
    names = {weight: name for name, weight in model.named_parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in reversed(list(model.modules())):  # from the inside: a module is divided with all that is in it
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        own = dict(module.named_parameters(recurse=False))
        for attribute, weight in own.items():
            if weight not in made:
                value = torch.empty(weight.shape, dtype=torch.float32, device=device)
                fill(names[weight], value)
                value = value.to(dtype if weight.requires_grad or frozen is None else frozen)
                made[weight] = nn.Parameter(part(weight, value), requires_grad=weight.requires_grad)
            setattr(module, attribute, made[weight])
        if own and divide is not None:
            divide(module)
