"""Boundaries on the host, where plans are made, from tensors that may be on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.kept import TensorNotes

_read: TensorNotes[Tensor] = TensorNotes()
"""Values of tensors on devices."""


def on_host(x: Tensor) -> Tensor:
    """The values of a tensor on the CPU. Those of a tensor on a device are read once and kept as long as it lives.

    The host waits for the device when it meets a tensor, or what torch has written into it since; a model's layers,
    which pass the same tensor, do not wait again. Tensors made in torch.inference_mode do not count what is written
    into them, and are read in every call; so does compiled code, in each layer.
    """
    if x.device.type == "cpu" or torch.compiler.is_compiling() or x.is_inference():
        return x.cpu()
    found = _read.get(x)
    if found is None:
        found = x.detach().cpu()
        _read.put(x, found)
    return found
