"""Gradients of a call that is one launch: delta and gradients together, so that kernels can do with less.

Where all keys that a row sees are in one launch, its delta is the sum of weights times their gradients, too, for
which nobody has to read out; and what passes over rows anyway may find it on the way. An implementation that makes
use of it has a function `whole_backward`, with the arguments of the one below; it gives None where it does not.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of query, key and value, as from `reference.attend_backward`; and delta, as from `reference.row_delta`."""


def whole_backward(
    kernels: ModuleType,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    intervals: KeyIntervals,
    **settings: object,
) -> Gradients:
    """Gradients of `attend` without a carry, whose learned sinks may be among lse.

    Args:
        kernels: from `ringflash.kernels.select`.
        dout: (T, H, Dv), gradient of out.
        query: as in `reference.attend_backward`; so are key, value and intervals.
        key: see query.
        value: see query.
        out: (T, H, Dv), what `attend` gave.
        lse: (H, T) fp32, what `attend` gave.
        dlse: (H, T) or None, gradient of the log-sum-exp.
        intervals: see query.
        settings: as in `reference.attend_backward`, without a carry.
    """
    together = getattr(kernels, "whole_backward", None)
    found = together and together(dout, query, key, value, out, lse, dlse, intervals, **settings)
    if found:
        return found
    delta = kernels.row_delta(dout, out, dlse)
    return *kernels.attend_backward(dout, query, key, value, lse, delta, intervals, **settings), delta
