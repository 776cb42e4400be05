"""DeepSpeed under sequence parallelism: importing it for a device, and refusing what breaks its mean over ranks.

The ranks that share a sequence are, to DeepSpeed, ranks of one data-parallel group with all others. It takes the mean
of gradients over all of them, and nothing has to be told to it.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import ModuleType

import torch
import torch.distributed as dist

from ringflash.deepspeed_private import averaged_ranks, compile_no_cpu_collectives
from ringflash.errors import ArgumentError


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed on this device and in the default process group, quiet, and compiling nothing on CPUs.

    Args:
        device: this rank's. The default process group has to be there.
    """
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # torchrun sets it; DeepSpeed refuses to be without
    os.environ["DS_ACCELERATOR"] = device.type  # it would take a GPU that is there even if device=cpu
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    # It calls collectives by names that torch has deprecated; each call would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        compile_no_cpu_collectives(deepspeed)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    return deepspeed


def check_mean(group: dist.ProcessGroup) -> None:
    """Raise ArgumentError where DeepSpeed was told of sequence parallelism, and takes no mean over all its ranks.

    Args:
        group: the ranks that share a sequence.
    """
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is None:
        return
    ranks, divisor = averaged_ranks(groups)
    sharing = dist.get_process_group_ranks(group)
    if divisor == len(ranks) and set(sharing) <= set(ranks):
        return
    raise ArgumentError(
        f"mpu, mesh_param or the JSON of deepspeed.initialize says to sum gradients over ranks {ranks} and to divide "
        f"them by {divisor:g}; allowed is their mean, over ranks with {sharing}, which share a sequence, among them: "
        "pass neither mpu nor mesh_param, and no data_parallel_size beside sequence_parallel_size"
    )
