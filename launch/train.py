"""Train a language model whose sequences are sharded over ranks.

torchrun --nproc-per-node 4 launch/train.py model=llama3_1b engine=zero2 train.seqlen=131072
python launch/train.py experiment=smoke                     # one process
python launch/train.py --cfg job                            # show the configuration, do nothing
python launch/train.py --multirun experiment=smoke optimizer.lr=1e-2,1e-3
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError, RingflashError, RunStoppedError
from ringflash.training.config.agreement import agree
from ringflash.training.config.checks import check
from ringflash.training.config.composing import compose, groups, sweep, typed
from ringflash.training.config.derived import device_type
from ringflash.training.run.interruption import STOPPED, ignore_signals
from ringflash.training.run.loop import train


def main() -> None:
    """Join the other ranks and train; an error that ringflash raises on purpose is one line, not a traceback.

    The exit status is 0 after the last step, 75 if a signal stopped the run and it was saved, otherwise something else.
    """
    rank = int(os.environ.get("RANK", "0"))
    parser = _parser()
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.help:
            _help(parser, arguments)
        elif arguments.cfg:
            _show(arguments)
        else:
            for overrides in sweep(arguments.overrides) if arguments.multirun else [arguments.overrides]:
                run(typed(compose(overrides, arguments.config_dir)))
    except RunStoppedError as stopped:
        ignore_signals()
        print(f"rank {rank}: {stopped}; exit status {STOPPED}", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except RingflashError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except (HydraException, OmegaConfBaseException) as error:
        cause = f"\n{error.__cause__}" if error.__cause__ else ""  # often it is the cause that names the key
        print(f"rank {rank}: {error}{cause}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(config: Config) -> None:
    """One run from its configuration to its end, on the ranks that torchrun has started, or alone."""
    check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    device = join(config)
    agree(config)
    train(config, device)
    dist.barrier()  # a process that goes while another still talks to it is at times aborted at its exit
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


def _parser() -> argparse.ArgumentParser:
    # Those of Hydra's flags that cannot name code: hydra.main would also unpickle files, and start what its node names.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("overrides", nargs="*", help="group=file or key=value; see docs/training.md")
    parser.add_argument("--help", "-h", action="store_true", help="show this, the groups and the configuration")
    parser.add_argument("--cfg", "-c", choices=["job"], help="show the configuration, do nothing")
    parser.add_argument("--package", "-p", help="with --cfg: show this part of it, such as model")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: show values instead of ${...}")
    parser.add_argument("--config-dir", "-cd", help="folder of further files for the groups: experiment/mine.yaml")
    parser.add_argument("--multirun", "-m", action="store_true", help="one run after another for key=value,value")
    return parser


def _show(arguments: argparse.Namespace) -> None:
    config = compose(arguments.overrides, arguments.config_dir)
    part = config if arguments.package is None else OmegaConf.select(config, arguments.package)
    if part is None:
        raise ArgumentError(f"--package={arguments.package} is no part of the configuration")
    print(OmegaConf.to_yaml(part, resolve=arguments.resolve) if isinstance(part, Container) else part, end="")


def _help(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    print(parser.format_help(), "\ngroups:", sep="")
    for group, files in groups(arguments.config_dir).items():
        print(f"  {group}: {', '.join(files)}")
    print("\nconfiguration:")
    _show(arguments)


if __name__ == "__main__":
    main()
