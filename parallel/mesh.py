"""Process groups, as users give them: nothing, a ProcessGroup, a named dimension of a DeviceMesh, or one device."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringflash.errors import ArgumentError


@dataclass(frozen=True)
class GroupLeftBehind:
    """In place of the group of a module that was saved; a process group does not travel in a file.

    Attributes:
        ranks: how many it had.
    """

    ranks: int


class OneDevice(enum.Enum):
    """Type of `ONE_DEVICE`."""

    ONE_DEVICE = "one device"


ONE_DEVICE = OneDevice.ONE_DEVICE
"""A group for calls that never communicate, whether torch.distributed is initialised or not."""

Group = dist.ProcessGroup | DeviceMesh | OneDevice | None
"""None is the default group if torch.distributed is initialised, and one device otherwise."""


def process_group(group: Group) -> dist.ProcessGroup | None:
    """The process group meant, or None for one device.

    Raises:
        ArgumentError: a DeviceMesh of more than one dimension, a group that this rank is not in, or something else.
    """
    if group is ONE_DEVICE:
        return None
    if isinstance(group, GroupLeftBehind):
        raise ArgumentError(
            f"group was a group of {group.ranks} ranks that does not travel in a file; set it to one of this process, "
            "as module.group = mesh['sequence']"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ArgumentError(
                f"group is a DeviceMesh with dimensions {group.mesh_dim_names}; pass one of them, like mesh['sequence']"
            )
        if group.get_coordinate() is None:
            raise ArgumentError("group: this rank is not a member of it")
        return group.get_group()
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ArgumentError("group: this rank is not a member of it")
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(f"group={group!r}; allowed are a ProcessGroup, a one-dimensional DeviceMesh, or None")
    return group


def place_in(group: Group) -> tuple[int, int]:
    """This process's rank, and the number of ranks; (0, 1) on one device."""
    found = process_group(group)
    return (0, 1) if found is None else (found.rank(), found.size())


def group_size(group: Group) -> int:
    """Number of ranks; 1 for one device."""
    return place_in(group)[1]


def group_name(group: Group) -> str:
    """Name under which operators find the group; empty where there is only one rank."""
    found = process_group(group)
    return "" if found is None or found.size() == 1 else found.group_name
