"""What is needed of Transformers that Transformers does not document, name by name.

Another version may rename or change any of it. tests/training/test_pretrained.py shows for each what is relied on, so
that an upgrade shows which one went.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Source(NamedTuple):
    """Of which tensors of a file a parameter is made, and how.

    Attributes:
        first: name by which the converter knows what it makes.
        keys: tensors of the file, each with the converter's pattern that it matches.
        converter: puts them together; None for one tensor as it is.
    """

    first: str
    keys: list[tuple[str, str | None]]
    converter: WeightConverter | None


def sources(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Source]:
    """Of which of the tensors in its files each parameter and buffer of a model is made, as `from_pretrained` has it.

    Args:
        model: may be on the meta device.
        keys: names of the tensors that there are.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    there: Any = model.state_dict()
    found: dict[str, Source] = {}
    for key in sorted(keys, key=_natural):  # experts are stacked in this order
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, there)
        if name not in there and key in there:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, there)
        if name not in there:
            continue
        if pattern is None:
            found[name] = Source(name, [(key, None)], None)
            continue
        converter = by_pattern[pattern]
        source = found.setdefault(name, Source(name, [], converter))
        source.keys.append((key, pattern))
        for target in converter.target_patterns[1:]:
            found[name.replace(converter.target_patterns[0], target)] = source
    return found


def ignored(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor of a file is known to have no place in a model, as frequencies that older versions wrote."""
    known: Any = model._keys_to_ignore_on_load_unexpected or ()
    return key.endswith("rotary_emb.inv_freq") or any(re.search(pattern, key) for pattern in known)


def converted(model: PreTrainedModel, name: str, source: Source, read: Callable[[str], Tensor]) -> Tensor:
    """A parameter, made of the tensors of its source.

    Args:
        model: the same as for `sources`.
        name: of the parameter.
        source: its source.
        read: a tensor of the files by its name.
    """
    if source.converter is None:
        return read(source.keys[0][0])
    converter = copy.deepcopy(source.converter)
    for key, pattern in source.keys:
        assert pattern is not None
        converter.add_tensor(source.first, key, pattern, read(key))  # pyrefly: ignore[bad-argument-type]  # or a Future
    made: Any = converter.convert(source.first, model=model, config=model.config)[name]
    return made[0] if isinstance(made, list) else made


def _natural(key: str) -> list[tuple[bool, int | str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in key.split(".")]


def run_layers_by(model: PreTrainedModel, run: Callable[..., Any]) -> None:
    """Have `run(layer, x, ..., module=layer with its hooks)` called for each of a model's layers while it trains.

    Raises:
        ValueError: the model knows of no checkpointing of activations.
    """
    older = model.gradient_checkpointing_enable  # before Transformers 5.16
    getattr(model, "activation_checkpointing_enable", older)()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            by = functools.partial(_run_layer, run)
            module._gradient_checkpointing_func = by  # pyrefly: ignore[bad-argument-type]  # no module, nor tensor


def _run_layer(run: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    """Since Transformers 5.16 a layer's hooks, as FSDP2's, are outside of the function that it has run."""
    module = layer
    if isinstance(layer, functools.partial) and layer.args:
        module = functools.partial(*layer.args, **layer.keywords)
    return run(layer, *inputs, module=module)
