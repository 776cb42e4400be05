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
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError

from ringflash.configs.schema import Config, SourceConfig, register
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
        ArgumentError: something would configure Hydra itself, or there is no such key, group's file or folder.
        HydraException: a value of the wrong type, and what else Hydra refuses.
    """
    with _hydra() as loader:
        parsed, search = _parsed(overrides, loader), _search_path(config_dir)
        known = _inside(loader, "", ObjectType.GROUP, config_dir)
        _refuse_hydra_overrides(parsed)
        _refuse_unknown_overrides(parsed, known, lambda group: _inside(loader, group, ObjectType.CONFIG, config_dir))
        overrides = [*_implied(parsed), *overrides]
        try:
            config = hydra_compose("config", [*search, *overrides], return_hydra_config=True)
        except HydraException as error:
            _refuse_unknown_key_of_a_file(error, known)
            raise
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
        found = _inside(loader, "", ObjectType.GROUP, config_dir)
        return {group: _inside(loader, group, ObjectType.CONFIG, config_dir) for group in found}


def _inside(loader: ConfigLoader, group: str, kind: ObjectType, config_dir: str | None) -> list[str]:
    """Names of groups, or of files, in a group; "" holds all groups."""
    found = loader.get_group_options(group, kind, "config", _search_path(config_dir))
    return sorted(name for name in found if name != "hydra")


@contextmanager
def _hydra() -> Generator[ConfigLoader]:
    register()
    with initialize_config_module("ringflash.configs", job_name="train", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _parsed(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    return OverridesParser.create(loader).parse_overrides(list(overrides))


def _implied(overrides: Sequence[Override]) -> list[str]:
    """A model of a folder has no shape among the keys, so `model.path=FOLDER` chooses the file that has none."""
    given = {override.key_or_group: override.value() for override in overrides}
    return ["model=pretrained"] if given.get("model.path") is not None and "model" not in given else []


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


def _refuse_unknown_overrides(
    overrides: Sequence[Override], groups: Collection[str], files: Callable[[str], Sequence[str]]
) -> None:
    # Before composing: of a key that it does not know Hydra says that + adds it, which would be refused here.
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if not key:
            raise ArgumentError(f"{override.input_line} names no key; allowed are key=value and group=file")
        if key not in groups:
            _refuse_unknown_key(key)
        elif not override.is_delete() and not override.is_sweep_override():
            allowed = files(key)
            for file in value if isinstance(value, list) else [value]:
                elsewhere = isinstance(file, str) and (
                    "/" in file or "${" in file
                )  # within folders, or named by a value
                if file not in allowed and not elsewhere:
                    said = override.get_value_element_as_str() if file is value else file
                    raise ArgumentError(f"{key}={said}; allowed are {', '.join(allowed)}")
        if override.package and not override.package.startswith(("hydra", "_")):
            _refuse_unknown_key(override.package)


def _refuse_unknown_key_of_a_file(error: HydraException, groups: Collection[str]) -> None:
    """Raise ArgumentError if Hydra's error is about a key that the schema lacks; an override has none by now."""
    cause = error.__cause__ or error.__context__
    if (
        isinstance(cause, ConfigKeyError) and cause.object_type is SourceConfig
    ):  # an element of a list, whose place is lost
        known = {entry.name for entry in dataclasses.fields(SourceConfig)}
        raise _unknown(f"data.mixture[...].{cause.full_key}", known) from error
    if isinstance(cause, ConfigKeyError) and cause.full_key:
        if cause.full_key in groups:
            first = "begin its file with '# @package _global_'"
            raise ArgumentError(f"{cause.full_key} has no keys of its own; {first}") from error
        _refuse_unknown_key(cause.full_key)


def _refuse_unknown_key(key: str) -> None:
    kind, prefix = Config, ""
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            raise ArgumentError(f"{key} is no configuration key; {prefix[:-1]} is a value")
        known = {entry.name for entry in dataclasses.fields(kind)}
        if name not in known:
            raise _unknown(prefix + name, known)
        kind, prefix = get_type_hints(kind)[name], f"{prefix}{name}."


RENAMED = {"engine.activation_checkpointing": "engine.memory=recompute recomputes blocks, engine.memory=auto as needed"}
"""Keys that there were, and what stands for them now."""


def _unknown(key: str, known: Collection[str]) -> ArgumentError:
    if key in RENAMED:
        return ArgumentError(f"{key} is no configuration key any more: {RENAMED[key]}")
    return ArgumentError(f"{key} is no configuration key; allowed here are {', '.join(sorted(known))}")


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
            raise _unknown(f"{prefix}{name}", known)
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            _refuse_unknown(node[name], f"{prefix}{name}.")
