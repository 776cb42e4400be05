"""Weights of a Hugging Face folder by the names of a model's parameters, one at a time.

`from_pretrained` fills a model that is whole; under ZeRO 3 no rank may ever hold one. So files are read here tensor by
tensor, and what a file has under other names or in other pieces is put together by Transformers' own rules.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ringflash.errors import DataError
from ringflash.training.corpus.passed_over import UNPLACED, PassedOver
from ringflash.transformers_private import converted, ignored, sources

SAMPLE, SAMPLES = 1 << 16, 64
"""Bytes that are read at each of so many places of a file, to know it again."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class FolderWeights:
    """Reads a folder's safetensors for a model that may be on the meta device.

    Attributes:
        passed_over: counts the tensors of the files that the model has no place for.

    Raises:
        DataError: the folder has no safetensors, or none for a parameter; names the file and the parameter.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._folder, self._model = folder, model
        self._files = {name: _opened(folder / name) for name in _names(folder)}
        self._place = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118
        self._sources = sources(model, self._place)
        self.passed_over = PassedOver()
        for key in sorted(self._place.keys() - {key for source in self._sources.values() for key, _ in source.keys}):
            if not ignored(model, key):
                self.passed_over.add(UNPLACED, key)
        self._same = _tied(model)
        self._shapes = {name: weight.shape for name, weight in model.named_parameters()}
        absent = [names[0] for names in self._same.values() if not any(name in self._sources for name in names)]
        if absent:
            more = f" and {len(absent) - 1} more" if absent[1:] else ""
            raise DataError(
                f"model.path={folder}: its files have no {absent[0]}{more}, which a {type(model).__name__} consists of"
            )
        self._load_buffers()

    def read(self, name: str) -> Tensor:
        """A parameter in the dtype of its file, on the CPU."""
        stored = next(each for each in self._same[name] if each in self._sources)
        tensor = converted(self._model, stored, self._sources[stored], self._tensor)
        shape = self._shapes[name]
        if tensor.shape != shape:
            raise DataError(
                f"model.path={self._folder}: {name} is {tuple(tensor.shape)} in its files and {tuple(shape)} by its "
                "config.json"
            )
        return tensor

    @functools.cached_property
    def digest(self) -> str:
        """What tells these weights from others: the sizes of their files, and samples of their bytes."""
        found = hashlib.sha256()
        for name in self._files:
            with open(self._folder / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                found.update(f"{name} {size} ".encode())
                for place in range(0, size, max(SAMPLE, size // SAMPLES)):
                    file.seek(place)
                    found.update(file.read(SAMPLE))
        return found.hexdigest()

    def _tensor(self, key: str) -> Tensor:
        try:
            return self._files[self._place[key]].get_tensor(key)
        except SafetensorError as error:
            raise DataError(f"model.path: cannot read {key} of {self._folder / self._place[key]}: {error}") from error

    @torch.no_grad()
    def _load_buffers(self) -> None:
        """Buffers that belong to a model's state, as a router's bias, are whole on every rank."""
        for name, buffer in self._model.named_buffers():
            if name in self._sources:
                buffer.copy_(converted(self._model, name, self._sources[name], self._tensor))


def _names(folder: Path) -> list[str]:
    """The safetensors files of a folder."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
            absent = [name for name in names if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise DataError(f"model.path: cannot read {folder / INDEX}: {error!r}; copy it anew") from error
        if absent:
            raise DataError(f"model.path={folder}: {INDEX} names {absent[0]}, which is not there; copy it anew")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not folder.is_dir():
        raise DataError(f"model.path={folder}: no such folder")
    raise DataError(
        f"model.path={folder}: no {SINGLE} and no {INDEX} in it; other formats are turned into these by "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"model.path: cannot read {path}: {error}; copy it anew") from error


def _tied(model: PreTrainedModel) -> dict[str, list[str]]:
    """All names of each parameter, by the first of them, which stands first."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {each[0]: each for each in names.values()}
