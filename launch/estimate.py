"""Says what a step takes of each GPU, of its host and of time, before anything is started.

    python launch/estimate.py experiment=llama3_8b_long gpus=4
    python launch/estimate.py experiment=llama3_8b_long train.seqlen=1048576 gpus=8 card=h200 host_gib=1800

All words but these four are overrides of the configuration, as of launch/train.py. Nothing runs, on no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError, RingflashError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.estimate.hardware import CARDS, GIB, Hardware
from ringflash.training.estimate.step import Estimate, estimate, longest
from ringflash.training.memory.plan import said


def as_text(config: Config, hardware: Hardware, found: Estimate, fitting: int) -> str:
    """What is to be shown."""
    seqlen = config.train.seqlen
    device = found.device | ({"to reach each other": found.leased} if found.leased else {})
    width = max(map(len, (*device, *found.host)))
    lines = [
        f"{seqlen:,} tokens, {config.engine.name}, engine.memory={config.engine.memory}, {hardware.gpus} GPUs",
        said(found.placements, found.pairs, queries=found.queries),
        "",
        "of each GPU, GiB",
        *(f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in device.items()),
        f"  {'together':<{width}}  {sum(device.values()) / GIB:8.2f} of {hardware.card.memory / GIB:.1f}",
        "of its host, GiB for each GPU",
        *(f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in found.host.items()),
        "",
        f"{found.seconds:.2f} s a step, {found.tokens_per_second:,.0f} tokens/s/GPU, MFU {found.mfu:.1%}, "
        "by the device's work alone",
        "it fits" if found.fits else "it does NOT fit",
        f"the longest train.seqlen that fits: {fitting:,}" if fitting else "no train.seqlen fits",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="group=file or key=value; see docs/training.md")
    parser.add_argument("--gpus", type=int, required=True, help="how many ranks")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="how many of them on a host (8)")
    parser.add_argument("--card", choices=CARDS, default="h100", help="which GPU (h100)")
    parser.add_argument("--host-gib", type=float, default=1024, help="memory of a host, free before the run (1024)")
    return parser


OWN = ("gpus", "gpus_per_host", "card", "host_gib")
"""Options, also taken as key=value."""


def _as_flag(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"--{key.replace('_', '-')}={value}" if equals and key in OWN else word


def main(arguments: Sequence[str] | None = None) -> None:
    """Print it; an error that ringflash raises on purpose is one line."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_intermixed_args([_as_flag(word) for word in words])
    try:
        for name in ("gpus", "gpus_per_host", "host_gib"):
            if not 0 < getattr(options, name) < math.inf:
                raise ArgumentError(f"{name}={getattr(options, name)}; allowed are finite numbers above 0")
        config = load(options.overrides)
        check(config, options.gpus)
        hardware = Hardware(options.gpus, CARDS[options.card], options.host_gib * GIB, options.gpus_per_host)
        print(as_text(config, hardware, estimate(config, hardware), longest(config, hardware)))
    except (RingflashError, HydraException, OmegaConfBaseException) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
