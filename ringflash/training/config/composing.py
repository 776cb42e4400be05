"""From files and overrides to a configuration, without running anything that they name.

Hydra composes; none of what it could start besides is started. Its own node, `hydra`, names classes to instantiate
(callbacks, launcher, sweeper), factories to call (`()` in the logging nodes), packages to import (searchpath) and
environment variables to set, so a file that someone hands over could run code by it. Here that node is never used, and
whatever sets any of it is refused by its key. Every other key is one of ringflash.configs.schema.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict

from ringflash.configs.schema import Config, register
from ringflash.errors import ArgumentError

COMPUTED = {"hydra.overrides", "hydra.runtime", "hydra.job.override_dirname"}
"""What Hydra itself writes into its node while it composes."""


def load(overrides: Sequence[str] = ()) -> Config:
    """The configuration that a command line of these overrides gives, for notebooks and tests.

    Example: load(["model=llama3_1b", "train.seqlen=131072"])
    """
    return typed(compose(overrides))


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """Compose config.yaml with its groups and these overrides.

    Args:
        overrides: as on Hydra's command line.
        config_dir: folder of further files for the groups, such as experiment/mine.yaml.

    Raises:
        ArgumentError: something would configure Hydra itself, or there is no such folder.
        HydraException: a key, group or type that does not exist.
    """
    with _hydra() as loader:
        _refuse_hydra_overrides(_parsed(overrides, loader))
        search = _search_path(config_dir)
        config = hydra_compose("config", [*search, *overrides], return_hydra_config=True)
        untouched = hydra_compose("config", search, return_hydra_config=True)
    for key in _differences(_plain(config.hydra), _plain(untouched.hydra), "hydra"):
        raise _refusal(key)
    HydraConfig.instance().set_config(config)  # for values such as ${hydra:job.override_dirname}
    with open_dict(config):
        del config["hydra"]
    return config


def typed(config: DictConfig) -> Config:
    """The dataclass of a composed configuration; keys that the schema lacks are refused, however they came in."""
    _refuse_unknown(config)
    made: Any = OmegaConf.to_object(config)
    return made


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each run of a sweep: all combinations of the keys that are given several values.

    Example: sweep(["optimizer.lr=1e-3,1e-4", "seed=0"]) -> [["optimizer.lr=0.001", "seed=0"], [...]]
    """
    values: dict[str, list[str]] = {}
    with _hydra() as loader:
        for override in _parsed(overrides, loader):
            key = override.get_key_element()
            assert override.input_line is not None  # as it was parsed
            if not override.is_sweep_override():
                values[key] = [override.input_line]
            elif override.is_discrete_sweep():
                values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                raise ArgumentError(f"{override.input_line} has no end; a sweep takes values, ranges and globs")
    return [list(run) for run in itertools.product(*values.values())]


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Names of the files of each group."""
    with _hydra() as loader:

        def inside(group: str, kind: ObjectType) -> list[str]:
            return sorted(loader.get_group_options(group, kind, "config", _search_path(config_dir)))

        return {group: inside(group, ObjectType.CONFIG) for group in inside("", ObjectType.GROUP) if group != "hydra"}


@contextmanager
def _hydra() -> Generator[ConfigLoader]:
    register()
    with initialize_config_module("ringflash.configs", job_name="train", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _parsed(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    return OverridesParser.create(loader).parse_overrides(list(overrides))


def _search_path(config_dir: str | None) -> list[str]:
    # The only way to Hydra's search path that it documents for composing without its command line.
    if config_dir is None:
        return []
    folder = Path(config_dir).absolute()
    if not folder.is_dir():
        raise ArgumentError(f"--config-dir={config_dir}: no such folder")
    return [f"hydra.searchpath=[{QuotedString(f'file://{folder}', Quote.single).with_quotes()}]"]


def _refuse_hydra_overrides(overrides: Sequence[Override]) -> None:
    # Before composing: of hydra.searchpath, packages are imported while composing.
    for override in overrides:
        if re.split(r"[./]", override.key_or_group)[0] == "hydra":
            raise _refusal(override.key_or_group)


def _refusal(key: str) -> ArgumentError:
    return ArgumentError(
        f"{key} would configure Hydra itself, which can run code; allowed are the keys that --cfg job shows"
    )


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=False)


def _differences(node: object, untouched: object, key: str) -> Iterator[str]:
    """Keys below `key` whose values differ."""
    if key in COMPUTED or node == untouched:
        return
    if not isinstance(node, dict) or not (node or untouched):
        yield key
        return
    untouched = untouched if isinstance(untouched, dict) else {}
    for name in [*node, *(name for name in untouched if name not in node)]:
        yield from _differences(node.get(name), untouched.get(name), f"{key}.{name}")


def _refuse_unknown(node: DictConfig, prefix: str = "") -> None:
    # Hydra's "+key=value" opens typed nodes too, and OmegaConf would hand the extra key on as an attribute.
    kind: Any = OmegaConf.get_type(node)
    known = {entry.name for entry in dataclasses.fields(kind)}
    for name in node:
        if name not in known:
            raise ArgumentError(f"{prefix}{name} is no configuration key; allowed here are {', '.join(sorted(known))}")
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            _refuse_unknown(node[name], f"{prefix}{name}.")
