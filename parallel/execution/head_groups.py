"""As many heads at a time as there is room for what they take in fp32.

A pass keeps results, and gradients of queries and of keys, in fp32 until the last keys have been seen: of all heads
more than everything else that attention takes, where ranks hold a hundred thousand tokens. Heads know nothing of each
other, so some are worked on from the first key to the last, then others, as UPipe (arXiv 2602.21196) has it for ranks
that exchange heads.

Legend: T query rows of this rank; H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.parallel.execution import executor
from ringflash.parallel.execution.call import NEEDS, Inputs, Located, Settings, locate, refusals_notified, table_of
from ringflash.parallel.placement import Placement
from ringflash.parallel.planning.heads import head_groups


class Group(NamedTuple):
    """Heads that are worked on together.

    Attributes:
        queries: which query heads.
        keys: which key heads, all whose queries those are.
        inputs: the call's, of these heads.
        settings: the call's; with a handle they keep nothing of what crosses.
    """

    queries: slice
    keys: slice
    inputs: Inputs
    settings: Settings


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Returns:
        out (T, H, Dv) like the query, lse (H, T) fp32, and the table that `backward` wants, see `call.shape_of_table`.
    """
    where = locate(inputs, settings)
    table = table_of(inputs, settings)
    groups = 1 if where is None or where[0].short else _groups(inputs, *where)
    if groups == 1:
        return executor.forward(inputs, settings, table, where)
    query, value = inputs.query, inputs.value
    sizes = (*query.shape[:-1], value.shape[-1]), query.shape[1::-1]
    out, lse = _room(where, query, zip(sizes, (query.dtype, torch.float32), strict=True))
    for group in _split(inputs, settings, groups):
        found = executor.forward(group.inputs, group.settings, table, where, group.queries.start)
        out[:, group.queries], lse[group.queries] = found[:2]
        del found  # before the next ones are there
    return out, lse, table


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, table: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks of this rank; see `executor.backward`."""
    where = locate(inputs, settings)
    groups = 1 if where is None or where[0].short else _groups(inputs, *where)
    if groups == 1:
        return executor.backward(dout, dlse, out, lse, table, inputs, settings, where)
    nothing = inputs.query.new_empty(0)
    wanted = [getattr(inputs, name) if settings.needs & bit else nothing for name, bit in NEEDS.items()]
    results = _room(where, inputs.query, [(x.shape, x.dtype) for x in wanted])
    for group in _split(inputs, settings, groups):
        heads, keys = group.queries, group.keys
        of_heads = dout[:, heads], None if dlse is None else dlse[heads], out[:, heads], lse[heads]
        found = executor.backward(*of_heads, table, group.inputs, group.settings, where, heads.start)
        for result, own, x in zip(results, (heads, keys, keys, heads), found, strict=True):
            if x.numel():
                (result if x.dim() == 1 else result.transpose(0, 1))[own] = x if x.dim() == 1 else x.transpose(0, 1)
        del found, x
    return results[0], results[1], results[2], results[3]


def _groups(inputs: Inputs, placement: Placement, index: int) -> int:
    return head_groups(placement.rows_in_groups(index), *_heads(inputs), placement.head_ranks)


def _room(where: Located, like: Tensor, wanted: Iterable[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Memory for what all groups give; the other ranks hear of it where there is none."""
    with refusals_notified(None if where is None else where[0].group):
        return [like.new_empty(tuple(shape), dtype=dtype) for shape, dtype in wanted]


def _heads(inputs: Inputs) -> tuple[int, int, int]:
    return inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[2]


def _split(inputs: Inputs, settings: Settings, groups: int) -> Iterator[Group]:
    heads, key_heads, _ = _heads(inputs)
    settings = settings if inputs.handle is None else settings._replace(sizes=())
    for number in range(groups):
        queries, keys = (slice(n // groups * number, n // groups * (number + 1)) for n in (heads, key_heads))
        own = inputs._replace(
            query=inputs.query[:, queries],
            key=inputs.key[:, keys],
            value=inputs.value[:, keys],
            **inputs.of_heads(queries.start, queries.stop, keys.stop - keys.start),
        )
        yield Group(queries, keys, own, settings)
