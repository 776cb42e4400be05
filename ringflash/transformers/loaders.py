"""Loaders and metrics of an `accelerate.Accelerator` whose ranks share sequences in groups.

To accelerate each rank is a process with samples of its own. Here a group of ranks is: all of its ranks get the same
batch, and what they gather counts each sample once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader

from ringflash.errors import ArgumentError


class _Groups(NamedTuple):
    """Where this rank is among the groups.

    Attributes:
        number: of its group.
        count: how many groups there are.
        peers: the ranks that have the same place in their groups; None with one group.
    """

    number: int
    count: int
    peers: dist.ProcessGroup | None


def share_batches(accelerator: Accelerator, group: dist.ProcessGroup | None) -> None:
    """From now on `accelerator.prepare(loader)` gives one group one batch, and `gather_for_metrics` each sample once.

    Args:
        accelerator: gets two methods of its own.
        group: the ranks that share a sequence; None for one, where accelerate is right as it is.

    Raises:
        ArgumentError: groups are not of consecutive ranks, or accelerate is to read batches on one rank for all.
    """
    if group is None:
        return
    if accelerator.dispatch_batches:
        raise ArgumentError(
            "dispatch_batches=True: rank 0 reads batches and gives each rank another part of them; allowed is False"
        )
    groups = _groups(group)
    prepare = functools.partial(_prepare_data_loader, accelerator, accelerator.prepare_data_loader, groups)
    gather = functools.partial(_gather_for_metrics, accelerator, groups)
    vars(accelerator).update(prepare_data_loader=prepare, gather_for_metrics=gather)


def _groups(group: dist.ProcessGroup) -> _Groups:
    world, ranks = dist.get_world_size(), dist.get_process_group_ranks(group)
    size, first = len(ranks), ranks[0]
    if ranks != list(range(first, first + size)) or first % size or world % size:
        raise ArgumentError(
            f"group has ranks {ranks} of {world}; allowed are {size} consecutive ranks, from a multiple of {size} on"
        )
    if world == size:
        return _Groups(0, 1, None)
    peers: Any = dist.new_subgroups_by_enumeration([list(range(place, world, size)) for place in range(size)])[0]
    return _Groups(first // size, world // size, peers)


def _prepare_data_loader(
    accelerator: Accelerator,
    register: Callable[..., DataLoader],
    groups: _Groups,
    data_loader: DataLoader,
    device_placement: bool | None = None,
    slice_fn_for_dispatch: Callable | None = None,
) -> DataLoader:
    """`Accelerator.prepare_data_loader` with groups in the place of processes."""
    if not getattr(data_loader, "_is_accelerate_prepared", False):
        _draw_alike(accelerator, groups, data_loader)
        data_loader = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=groups.count,
            process_index=groups.number,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=list(accelerator.rng_types or ()),
            dispatch_batches=False,  # the default of iterable datasets would be to read on rank 0 alone
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        data_loader._is_accelerate_prepared = True
    return register(data_loader)


def _draw_alike(accelerator: Accelerator, groups: _Groups, loader: DataLoader) -> None:
    """Make the ranks of a group draw the same samples, and their workers the same numbers."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    if hasattr(sampler, "generator") and sampler.generator is None:  # each rank would seed one of its own
        seed = broadcast(torch.empty((), dtype=torch.int64, device=accelerator.device).random_())
        sampler.generator = torch.Generator().manual_seed(int(seed))
    start = loader.worker_init_fn
    if isinstance(start, functools.partial) and "rank" in start.keywords:  # Trainer's, which seeds workers by rank
        loader.worker_init_fn = functools.partial(start, rank=groups.number)


def _gather_for_metrics(
    accelerator: Accelerator, groups: _Groups, input_data: Any, use_gather_object: bool = False
) -> Any:
    """`Accelerator.gather_for_metrics`, over one rank of each group where something has a row for each sample.

    A number (a tensor without dimensions) is each rank's own, as a sum over its tokens is, and comes from all ranks.
    """
    state = accelerator.gradient_state
    samples = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

    def of_groups(x: Tensor) -> Tensor:
        if x.dim() == 0:
            return accelerator.gather(x)
        parts = [x]
        if groups.peers is not None:
            parts = [torch.empty_like(x) for _ in range(groups.count)]
            dist.all_gather(parts, x.contiguous(), group=groups.peers)
        return torch.cat(parts)[:samples]

    if not use_gather_object and _holds_tensors(input_data):
        return recursively_apply(of_groups, input_data)
    objects: list[Any] = [input_data]
    if groups.peers is not None:
        objects = [None] * groups.count
        dist.all_gather_object(objects, input_data, group=groups.peers)
    return [x for part in objects for x in part][:samples]


def _holds_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
