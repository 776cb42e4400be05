"""Says what a step takes of each GPU, of its host and of time, before anything is started.

    python launch/estimate.py experiment=llama3_8b_long gpus=4
    python launch/estimate.py experiment=llama3_8b_long train.seqlen=1048576 gpus=8 card=h200 host_gib=1800
    python launch/estimate.py model.path=folder lora.rank=16 engine=fsdp2 train.seqlen=131072 gpus=4

All words but gpus, gpus_per_host, card and host_gib are overrides of the configuration, as of launch/train.py. Nothing
runs, on no GPU. Of a Hugging Face folder config.json is enough.
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
from ringflash.training.estimate.fitting import remedies
from ringflash.training.estimate.hardware import CARDS, GIB, Hardware
from ringflash.training.estimate.step import Estimate, estimate, in_seconds, longest
from ringflash.training.memory.plan import said


def as_text(config: Config, hardware: Hardware, card: str, found: Estimate, fitting: int) -> str:
    """What is to be shown."""
    seqlen, per_host = config.train.seqlen, min(hardware.gpus, hardware.gpus_per_host)
    device = found.device | ({"to reach each other": found.leased} if found.leased else {})
    width = max(map(len, (*device, *found.host)))
    fits = "it fits"
    if not found.fits:
        cures = remedies(config, hardware)
        fits = f"it does NOT fit; {'it would with ' + '; or with '.join(cures) if cures else 'no key makes it fit'}"
    lines = [
        f"{seqlen:,} tokens, {config.engine.name}, engine.memory={config.engine.memory}, {hardware.gpus} x {card}, "
        f"{per_host} on a host of {hardware.host_bytes / GIB:,.0f} GiB",
        said(found.placements, found.pairs, queries=found.queries),
        "",
        "of each GPU, GiB",
        *(f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in device.items()),
        f"  {'together':<{width}}  {sum(device.values()) / GIB:8.2f} of {hardware.card.memory / GIB:.1f}",
        "of its host, GiB for each GPU",
        *(f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in found.host.items()),
        "",
        f"{in_seconds(found.seconds)} a step, {found.tokens_per_second:,.0f} tokens/s/GPU, MFU {found.mfu:.1%}, "
        "by the work of devices and links alone",
        fits,
        f"the longest train.seqlen that fits: {fitting:,}" if fitting else "no train.seqlen fits",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="group=file or key=value; see docs/training.md")
    parser.add_argument("--gpus", type=int, help="how many ranks")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="how many of them on a host (8)")
    parser.add_argument("--card", choices=CARDS, type=str.lower, default="h100", help="which GPU (h100)")
    parser.add_argument("--host-gib", type=float, default=1024, help="memory of a host, free before the run (1024)")
    return parser


OWN = ("gpus", "gpus_per_host", "card", "host_gib")
"""Options, also taken as key=value."""


def _as_flag(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"--{key.replace('_', '-')}={value}" if equals and key in OWN else word


def _hardware(options: argparse.Namespace) -> Hardware:
    gpus, per_host, host = options.gpus, options.gpus_per_host, options.host_gib
    if gpus is None:
        raise ArgumentError("gpus is missing; give the number of ranks, as gpus=4")
    for name, value in (("gpus", gpus), ("gpus_per_host", per_host)):
        if value < 1:
            raise ArgumentError(f"{name}={value}; allowed are 1 and more")
    if gpus > per_host and gpus % per_host:
        raise ArgumentError(f"gpus={gpus} on hosts of gpus_per_host={per_host}; all hosts have as many")
    if not 0 <= host < math.inf:
        raise ArgumentError(f"host_gib={host}; allowed are finite numbers from 0 on")
    return Hardware(gpus, CARDS[options.card], host * GIB, per_host)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print it; an error that ringflash raises on purpose is one line."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_intermixed_args([_as_flag(word) for word in words])
    try:
        hardware, config = _hardware(options), load(options.overrides)
        check(config, hardware.gpus)
        print(as_text(config, hardware, options.card, estimate(config, hardware), longest(config, hardware)))
    except RingflashError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except (HydraException, OmegaConfBaseException) as error:
        cause = str(error.__cause__).partition("\n")[0] if error.__cause__ else ""  # often it is what says why
        print(": ".join(filter(None, (str(error), cause))), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
