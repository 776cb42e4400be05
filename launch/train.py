"""Train a language model whose sequences are sharded over ranks.

torchrun --nproc-per-node 4 launch/train.py model=llama3_1b engine=zero2 train.seqlen=131072
python launch/train.py experiment=smoke                     # one process
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from ringflash.configs import schema
from ringflash.configs.schema import Config
from ringflash.errors import RingflashError, RunStoppedError
from ringflash.training.config import agree, check, device_type, typed
from ringflash.training.interruption import STOPPED, ignore_signals
from ringflash.training.loop import train

schema.register()


@hydra.main(config_path="pkg://ringflash.configs", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Join the other ranks and train; an error that ringflash raises on purpose is one line, not a traceback.

    The exit status is 0 after the last step, 75 if a signal stopped the run and it was saved, otherwise something else.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = typed(composed)
        check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        device = join(config)
        agree(config)
        train(config, device)
        if dist.is_initialized():
            dist.barrier()  # a process that goes while another still talks to it is at times aborted at its exit
    except RunStoppedError as stopped:
        ignore_signals()
        print(f"rank {rank}: {stopped}; exit status {STOPPED}", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except RingflashError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(config: Config) -> torch.device:
    """Choose this rank's device and start the default process group on it: NCCL on GPUs, gloo on CPUs."""
    timeout = timedelta(seconds=config.timeout)
    device = torch.device("cpu")
    torch.set_flush_denormal(True)  # probabilities below 1e-38 slow a CPU down tenfold
    if device_type(config) == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)  # before NCCL starts: its first collective would otherwise use GPU 0 on all ranks
    bound = device if device.type == "cuda" else None
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    else:
        store = dist.HashStore()  # one process without torchrun has nobody to meet
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=bound)
    return device


if __name__ == "__main__":
    main()
