"""Shardings found again by the arguments of a call: for callers that pass a mask and lengths instead of a sharding.

The only cache of calls' shardings; who finds them again by keys of another kind has one of the same class. It is
bounded in bytes, and what it lets go is not lost to who still holds it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ringflash.kernels.torch_private import is_destroyed
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, check_name
from ringflash.parallel.sharding import Sharding

MOST_BYTES = 256 * 2**20
"""What shardings that nobody else may hold keep on devices and on the host."""

Boundaries = Sequence[int] | Tensor | None


class Shardings:
    """Shardings by the values that they were made from; those not asked for longest go first.

    Args:
        most_bytes: bound of their size.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._found: OrderedDict[tuple, Sharding] = OrderedDict()
        self._sizes: dict[tuple, int] = {}
        self._newest: tuple | None = None

    def get(self, key: tuple) -> Sharding | None:
        """The sharding of a key, if it is there."""
        found = self._found.get(key)
        if found is not None:
            self._found.move_to_end(key)
        return found

    def add(self, key: tuple, sharding: Sharding) -> None:
        """Keep a sharding."""
        if self._newest in self._found:  # by now it has what it grew while it was used
            self._sizes[self._newest] = self._found[self._newest].nbytes()
        for ended in [other for other, x in self._found.items() if x.group is not None and is_destroyed(x.group)]:
            del self._found[ended], self._sizes[ended]
        self._found[key], self._newest = sharding, key
        self._sizes[key] = sharding.nbytes()
        while sum(self._sizes.values()) > self.most_bytes and len(self._found) > 1:
            oldest, _ = self._found.popitem(last=False)
            del self._sizes[oldest]

    def clear(self) -> None:
        """Let all of them go."""
        self._found.clear()
        self._sizes.clear()


shardings = Shardings()


def find(
    mask: Mask,
    sizes: tuple[int, int, int],
    group: dist.ProcessGroup | None,
    partition: str | Partition,
    cu_seqlens: Boundaries = None,
    query_cu_seqlens: Boundaries = None,
    head_ranks: int | None = None,
    plan: str | None = None,
) -> Sharding:
    """The sharding of a call's arguments, made if it is not there.

    Args:
        mask: rules, and documents that are known with them.
        sizes: batch, query tokens and key tokens of a sequence over all ranks.
        group: ranks that share a sequence; None for one device.
        partition: as in `Sharding`.
        cu_seqlens: as in `Sharding`, on the host.
        query_cu_seqlens: likewise.
        head_ranks: as in `Sharding`.
        plan: as in `Sharding`.
    """
    documents = None if cu_seqlens is None else (_digest(cu_seqlens), _digest(query_cu_seqlens))
    key = mask, sizes, group, partition, documents, head_ranks, plan
    try:
        found = shardings.get(key)
    except TypeError:  # not hashable
        check_name(partition)
        raise
    if found is None:
        place: dict[str, Any] = {"rank": 0, "ranks": 1} if group is None else {"group": group}
        found = Sharding(
            mask,
            batch=sizes[0],
            seqlen=sizes[1],
            key_seqlen=sizes[2],
            cu_seqlens=cu_seqlens,
            query_cu_seqlens=query_cu_seqlens,
            partition=partition,
            head_ranks=head_ranks,
            plan=plan,
            **place,
        )
        shardings.add(key, found)
    return found


class _Seen:
    """Digests of boundaries, kept beside the objects that hold them and compared with what they hold now.

    A caller passes the same tensor or list in every layer. To compare it with a copy takes a hundredth of the time
    that it takes to hash thousands of numbers.
    """

    MOST = 64

    def __init__(self) -> None:
        self._of: OrderedDict[int, tuple] = OrderedDict()

    def digest(self, x: Sequence[int] | Tensor) -> object:
        """Something hashable that is equal for equal boundaries."""
        # As an array: what torch makes of a tensor under torch.func holds nothing that the host could read.
        values = x.numpy() if isinstance(x, Tensor) else x
        found = self._of.get(id(x))
        if found is not None:
            held, copy, digest = found
            if held() is x and (np.array_equal(copy, values) if isinstance(values, np.ndarray) else copy == x):
                return digest
        digest = _of_values(values)
        held = weakref.ref(x) if isinstance(x, Tensor) else (lambda: x)
        self._of[id(x)] = held, values.copy() if isinstance(values, np.ndarray) else x[:], digest
        self._of.move_to_end(id(x))
        while len(self._of) > self.MOST:
            self._of.popitem(last=False)
        return digest


def _of_values(values: Sequence[int] | np.ndarray) -> object:
    found = np.array(values)
    return found.astype(np.int64).tobytes() if found.dtype in (np.int32, np.int64) else tuple(values)


_seen = _Seen()


def _digest(x: Sequence[int] | Tensor | None) -> object:
    return None if x is None else _seen.digest(x)
