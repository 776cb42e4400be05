"""The first thing that ranks say to each other: which configuration each was started with."""

from __future__ import annotations

import json

from ringflash.configs.schema import Config, entries
from ringflash.errors import RankMismatchError
from ringflash.training.config.derived import compute_dtype
from ringflash.training.engines import deepspeed_json
from ringflash.training.ranks import from_all


def agree(config: Config) -> None:
    """Raise RankMismatchError on every rank if one was started with another configuration; the first collective."""
    mine = {key: value for key, value, _ in entries(config)}
    mine["engine.precision of its GPU"] = str(compute_dtype(config))
    if config.engine.deepspeed is not None:  # machines may differ in what a file of that name holds
        mine["engine.deepspeed, in its file"] = json.dumps(deepspeed_json.read(config.engine.deepspeed), sort_keys=True)
    everybody = from_all(mine)
    for rank, other in enumerate(everybody):
        for key in sorted({*everybody[0], *other}):
            first, value = everybody[0].get(key, "no such key"), other.get(key, "no such key")
            if first != value:
                raise RankMismatchError(
                    f"rank {rank} was started with {key}={value}, rank 0 with {key}={first}; give all ranks the same"
                )
