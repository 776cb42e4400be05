"""What kernels run under, whatever their caller has set: the tensors' device, and the tensors' dtypes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ringflash.kernels.torch_private import no_autocast


def on_device_without_autocast(x: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one and ends autocast, as in torch's own operators.

    Triton launches on the current device: beside the streams of the tensor's, unnoticed where the two reach each other.
    Autocast would round the fp32 sums of kernels in torch operators to 16 bits.
    """
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return _on(x.device) if elsewhere else no_autocast()


@contextmanager
def _on(device: torch.device) -> Generator[None]:
    with torch.cuda.device(device), no_autocast():
        yield
