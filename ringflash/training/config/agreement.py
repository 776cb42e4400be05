"""The first thing that ranks say to each other: which configuration each was started with."""

from __future__ import annotations

from ringflash.configs.schema import Config, entries
from ringflash.errors import RankMismatchError
from ringflash.training.config.derived import compute_dtype
from ringflash.training.ranks import from_all


def agree(config: Config) -> None:
    """Raise RankMismatchError on every rank if one was started with another configuration; the first collective."""
    mine = {key: value for key, value, _ in entries(config)}
    everybody = from_all(mine | {"engine.precision of its GPU": str(compute_dtype(config))})
    for rank, other in enumerate(everybody):
        for key in sorted({*everybody[0], *other}):
            first, value = everybody[0].get(key, "no such key"), other.get(key, "no such key")
            if first != value:
                raise RankMismatchError(
                    f"rank {rank} was started with {key}={value}, rank 0 with {key}={first}; give all ranks the same"
                )
