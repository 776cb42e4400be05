"""What `Sharding` is given, checked: masks, lengths, boundaries, and the place of this process among its ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.device_boundaries import on_a_device
from ringflash.parallel.mesh import Group, process_group
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.mask import Mask

Boundaries = Sequence[int] | Tensor

RANKS_A_HOST = 8
"""Where nobody says how many."""


def masks_and_layers(
    given: Mask | Sequence[Mask] | Mapping[Mask, int] | None,
) -> tuple[tuple[Mask, ...], tuple[int, ...]]:
    """The masks of a batch, and how many layers have each."""
    given = Mask.causal() if given is None else given
    masks = (given,) if isinstance(given, Mask) else tuple(given)
    masks = tuple(mask.planned() if isinstance(mask, Mask) else mask for mask in masks)
    weights = tuple(given.values()) if isinstance(given, Mapping) else (1,) * len(masks)
    if not masks or not all(isinstance(mask, Mask) for mask in masks):
        raise ArgumentError(f"mask={given!r}; allowed are ringflash.Mask, as Mask.causal(), several of them, and None")
    if any(not isinstance(weight, int) or weight < 1 for weight in weights):
        raise ArgumentError(f"mask={given!r}; numbers of layers are allowed from 1")
    return masks, weights


def hosts_of(given: int | None, ranks: int) -> int:
    """Hosts that the ranks are on."""
    if given is not None:
        return at_least("hosts", given, 1)
    return 1 if ranks % RANKS_A_HOST else max(1, ranks // RANKS_A_HOST)


def at_least(name: str, size: int, least: int) -> int:
    """A size as an integer that is not smaller."""
    (found,) = integers(name, (size,))
    if found < least:
        raise ArgumentError(f"{name}={size!r}; allowed are integers from {least}")
    return found


def place_of(group: Group, rank: int | None, ranks: int | None) -> tuple[tuple[int, int], dist.ProcessGroup | None]:
    """Rank and number of ranks, and their group where there is one."""
    if (rank is None) != (ranks is None):
        raise ArgumentError(f"rank={rank}, ranks={ranks}; allowed are both or neither")
    if rank is not None and ranks is not None:
        if not 0 <= rank < ranks:
            raise ArgumentError(f"rank={rank}, ranks={ranks}; allowed is 0 <= rank < ranks")
        if group is None:
            return (rank, ranks), None
    found = sharing_group(group)
    place = (0, 1) if found is None else (found.rank(), found.size())
    if rank is not None and place != (rank, ranks):
        raise ArgumentError(f"rank={rank}, ranks={ranks}, but group has this process as rank {place[0]} of {place[1]}")
    return place, found


def sharing_group(group: Group) -> dist.ProcessGroup | None:
    """The process group meant; refuses to take a process that cannot know for the only one.

    Raises:
        ArgumentError: there is no group here, and other processes that this one may belong with.
    """
    found = process_group(group)
    if found is None and group is None:
        if torch.utils.data.get_worker_info() is not None:
            raise ArgumentError(
                "group=None in a DataLoader's worker, where torch.distributed is not initialised: pass rank= and "
                "ranks= to ringflash.Sharding, or group=ringflash.parallel.mesh.ONE_DEVICE"
            )
        if int(os.environ.get("WORLD_SIZE") or "1") > 1:
            raise ArgumentError(
                f"group=None, WORLD_SIZE={os.environ['WORLD_SIZE']}, and torch.distributed is not initialised: call "
                "torch.distributed.init_process_group first, or pass rank= and ranks= to ringflash.Sharding"
            )
    return None if found is None or found.size() == 1 else found


def boundaries_on_host(
    cu_seqlens: Boundaries | None, query_cu_seqlens: Boundaries | None, masks: Sequence[Mask], ranks: int
) -> tuple[tuple[tuple[int, ...] | None, tuple[int, ...] | None], tuple[Tensor, Tensor | None] | None]:
    """Boundaries as numbers, checked; or as tensors on a device."""
    if query_cu_seqlens is not None and cu_seqlens is None:
        raise ArgumentError("query_cu_seqlens is given without cu_seqlens, the boundaries of the keys")
    given = {"cu_seqlens": cu_seqlens, "query_cu_seqlens": query_cu_seqlens}
    for name, x in given.items():
        if isinstance(x, Tensor) and (x.dtype not in (torch.int32, torch.int64) or x.dim() != 1):
            raise ArgumentError(f"{name} is {x.dtype} {tuple(x.shape)}; allowed is int32 or int64 (documents + 1,)")
        if on_a_device(x) and (ranks > 1 or any(mask.boundaries is not None for mask in masks)):
            raise ArgumentError(f"{name} is on {x.device}; plans for {ranks} ranks are made on the CPU, pass it there")
    if any(on_a_device(x) for x in given.values()):
        device = next(x.device for x in given.values() if on_a_device(x))
        keys, queries = (
            None if x is None else x if isinstance(x, Tensor) else torch.tensor(integers(name, x), device=device)
            for name, x in given.items()
        )
        assert keys is not None
        return (None, None), (keys, queries)
    keys, queries = (
        None if x is None else tuple(x.tolist()) if isinstance(x, Tensor) else integers(name, x)
        for name, x in given.items()
    )
    if keys is None:
        return (None, None), None
    documents = Mask.documents(keys, queries)
    return (documents.boundaries, documents.query_boundaries), None


def length_of(
    boundaries: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
    on_device: tuple[Tensor, Tensor | None] | None,
    masks: Sequence[Mask],
    batch: int,
) -> int:
    """Query tokens of a sequence, by the last boundary."""
    keys, queries = boundaries if boundaries[0] is not None else (masks[0].boundaries, masks[0].query_boundaries)
    if on_device is not None or keys is None:
        raise ArgumentError("seqlen=None, and no cu_seqlens on the host say how many tokens there are; pass seqlen")
    total = (keys if queries is None else queries)[-1]
    if total % batch:
        raise ArgumentError(f"cu_seqlens end at {total}, which is no multiple of batch={batch}; pass seqlen")
    return total // batch
