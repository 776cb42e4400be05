"""What is needed of DeepSpeed that DeepSpeed does not document, name by name.

Another version may rename or change any of it. tests/training/test_deepspeed_private.py shows for each what is relied
on, so that an upgrade shows which one went.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MASTERS = (
    "fp32_partitioned_groups_flat",  # ZeRO 3
    "single_partition_of_fp32_groups",  # ZeRO 1 and 2
    "fp32_groups_flat_partition",  # ZeRO 1 in bf16
)


def compile_no_cpu_collectives(deepspeed: ModuleType) -> None:
    """Keep `init_distributed` from compiling an operator for CPUs, which takes minutes and needs a compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def averaged_ranks(groups: ModuleType) -> tuple[list[int], float]:
    """Ranks over which engines sum gradients, and by what they divide the sum, as `initialize` was told.

    Args:
        groups: `deepspeed.utils.groups`, which keeps `mpu` and the mesh of `mesh_param` for the whole process.
    """
    if groups.mpu is None and groups.mesh_device is None:
        ranks, sharing = list(range(dist.get_world_size())), 1
    else:
        ranks = dist.get_process_group_ranks(groups._get_sequence_data_parallel_group())
        sharing = groups._get_sequence_parallel_world_size()
    return ranks, len(ranks) / sharing


def copies_group(groups: ModuleType, size: int) -> dist.ProcessGroup:
    """Stage 3 with `zero_hpz_partition_size`: ranks that hold all weights among them, made once in a process.

    Args:
        groups: `deepspeed.utils.groups`.
        size: how many ranks do.
    """
    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


def master_weights(zero: object) -> list[Tensor]:
    """This rank's flat fp32 weights, one tensor for each parameter group (stage 3: for each sub-group)."""
    for name in MASTERS:
        if hasattr(zero, name):
            return getattr(zero, name)
    raise AttributeError(f"{type(zero).__name__} of this DeepSpeed version keeps its fp32 weights elsewhere")


def optimizer_state(zero: Any) -> dict[Tensor, dict[str, Tensor]]:
    """State of the torch optimizer that DeepSpeed wraps, by master weight."""
    return zero.optimizer.state


def link_optimizer_state(zero: Any) -> None:
    """Stages 1 and 2: let `safe_get_full_optimizer_state` find state that DeepSpeed's first step has not made."""
    zero._lazy_init_hp_params_optimizer_state()


def own_part(weight: Any, moment: str | None = None) -> tuple[int, Tensor] | None:
    """What this rank holds of a weight, in fp32, or of one of its moments; None if it holds nothing of it.

    Args:
        weight: one that is trained.
        moment: a name of the optimizer's state; None for the weight.

    Returns:
        The first element, of the flattened whole tensor, and a flat view. DeepSpeed's own functions for stage 3 give
        copies of what is offloaded, and there are none for stages 1 and 2.
    """
    if not hasattr(weight, "ds_id"):
        mapping = weight._hp_mapping
        return (
            None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).detach())
        )
    part, _ = weight._z3_optimizer._get_fp32_opt_state_partition(weight, False, moment)
    start = part_size(weight) * dist.get_rank()
    size = min(part_size(weight), weight.ds_numel - start)  # the rest of it is padding
    return (start, part.detach()[:size]) if size > 0 else None


def cast_own_part(weight: Any) -> None:
    """Stage 3: have the model's weight, in its own dtype, be what `own_part` gives."""
    held = own_part(weight)
    if held is not None:
        weight.ds_tensor.data[: len(held[1])].copy_(held[1])
    weight.ds_secondary_tensor = None  # a second division within a host, made anew from the first where there is none


def part_size(weight: Any) -> int:
    """Stage 3: elements of the equal parts in which the ranks hold a weight, the last ones padded."""
    return weight.ds_tensor.numel()


def whole_shape(weight: nn.Parameter) -> torch.Size:
    """Shape of a weight; one that stage 3 has divided is empty itself."""
    return getattr(weight, "ds_shape", weight.shape)
