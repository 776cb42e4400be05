"""Boundaries on the host, where plans are made, from tensors that may be on a device."""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch
from torch import Tensor

MOST = 64
"""Tensors whose values are kept."""

_read: OrderedDict[int, tuple[weakref.ref, int, Tensor]] = OrderedDict()


def on_host(x: Tensor) -> Tensor:
    """The values of a tensor on the CPU. Those of a tensor on a device are read once and kept.

    The host waits for the device when it meets a tensor, or what torch has written into it since; a model's layers,
    which pass the same tensor, do not wait again. Tensors made in torch.inference_mode do not count what is written
    into them, and are read in every call; so does compiled code, in each layer.
    """
    if x.device.type == "cpu" or torch.compiler.is_compiling() or x.is_inference():
        return x.cpu()
    found = _read.get(id(x))
    if found is not None and found[0]() is x and found[1] == x._version:
        return found[2]
    values = x.detach().cpu()
    _read[id(x)] = weakref.ref(x), x._version, values
    _read.move_to_end(id(x))
    while len(_read) > MOST:
        _read.popitem(last=False)
    return values
