"""Labels of tokens: which integers may stand in them, and where others are found."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.torch_private import assert_async

IGNORED_LABEL = -100
"""Label of a token that has no next token in its document; torch's cross entropy skips it."""

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)
"""Of ids and labels: those whose every number int64 has."""


def as_int64(name: str, ids: Tensor) -> Tensor:
    """Token ids or labels as int64, in which IGNORED_LABEL has a place; narrower ones wrap it to an id.

    Args:
        name: of the argument.
        ids: integers of any shape.

    Raises:
        ArgumentError: it is no tensor of integers.
    """
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"{name} is a {type(ids).__name__}; allowed is a tensor of integers")
    if ids.dtype not in DTYPES:
        raise ArgumentError(f"{name} is {ids.dtype}; allowed are int64 and {', '.join(map(str, DTYPES[:-1]))}")
    return ids.long()


def check_labels(name: str, labels: Tensor, vocabulary: int | None = None) -> None:
    """Refuse labels that are neither token ids nor IGNORED_LABEL, as -1 is, which some libraries ignore.

    On the CPU it raises. A GPU is not waited for, and neither is compiled code: they assert, as torch's cross entropy
    does, which ends a process on a GPU at its next call, with a message on standard error that names the argument.

    Args:
        name: of the argument.
        labels: int64, any shape.
        vocabulary: how many ids there are, where that is known; with None a GPU is not asked.

    Raises:
        ArgumentError: names a label and where it is; on the CPU only.
    """
    if type(labels) is not Tensor or labels.is_meta:
        return  # without numbers
    waiting = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if vocabulary is None and not waiting:
        return  # batches are made on the host, and the loss asks again
    wrong = (labels < 0) & (labels != IGNORED_LABEL)
    allowed = "0 and more"
    if vocabulary is not None:
        wrong |= labels >= vocabulary
        allowed = f"0 to {vocabulary - 1}"
    if not waiting:
        assert_async(~wrong.any(), f"{name} must be {allowed}, or {IGNORED_LABEL} where nothing is to be predicted")
    elif wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ArgumentError(
            f"{name}{place} is {int(labels[tuple(place)])}; allowed are {allowed}, and {IGNORED_LABEL} where nothing "
            "is to be predicted"
        )
