"""Sizes of a model of a Hugging Face folder, of which only config.json is read, and what a rank has of a batch.

Bytes and operations are those of a pass of tensors without memory (`counting`). They grow by as much for each layer of
those that are alike, and once what is in tiles has several of them, for each token; so two numbers of each are counted.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError, RingflashError
from ringflash.parallel.planning.cost import Shape
from ringflash.training.estimate.counting import GPU, Counted, Heads, count
from ringflash.training.estimate.lasting import weights_of
from ringflash.training.estimate.operations import operations_of
from ringflash.training.estimate.sizes import Load, Sizes, Work, dtype_of, of_batch
from ringflash.training.memory.plan import KEEP, RECOMPUTE
from ringflash.training.memory.rows import TILE_ELEMENTS
from ringflash.training.model.pretrained import Pretrained, feed_forwards, width_of
from ringflash.transformers.masks import layer_masks

FEWEST = 2
"""Layers that are counted, and one more, of a model of many that are alike."""


@dataclass(frozen=True)
class FolderSizes(Sizes):
    """Sizes of a model of Transformers and of what a rank has of a batch; see Sizes.

    Attributes:
        passes: counts them.
    """

    passes: Passes

    @staticmethod
    def of(config: Config, gpus: int, load: Load | None = None) -> FolderSizes:
        """What a configuration says.

        Args:
            config: of a run with a model of a folder.
            gpus: how many ranks.
            load: of the batch; None: each sequence is one document, and ranks have equally many tokens.

        Raises:
            DataError: the folder has no config.json that can be read.
            ArgumentError: a model that the recipe does not take, or of whose passes nobody knows without values how
                large tensors are, as where experts take the tokens that a router sends them one after another.
        """
        passes = passes_of(config)
        model = passes.whole
        of_the_batch: dict[str, Any] = of_batch(
            config, gpus, layer_masks(model.config.get_text_config(), causal=True), load
        )
        return FolderSizes(
            weights=weights_of(model),
            blocks=len(model.layers),
            element=model.dtype.itemsize,
            operations=operations_of(model),
            passes=passes,
            **of_the_batch,
        )

    @property
    def recomputes(self) -> bool:
        """See Sizes."""
        return self.passes.whole.recomputes

    @property
    def heads(self) -> Shape:
        """See Sizes."""
        found = self.passes.heads
        return Shape(found.query, found.key, found.width, self.element)

    @property
    def casts(self) -> bool:
        """See Sizes."""
        return True

    def kept(self, pairs: bool) -> float:
        """See Sizes."""
        found = self._counted(RECOMPUTE)
        return found.kept / self.blocks - (found.stream / 2 if pairs else 0)

    @property
    def again(self) -> float:
        """See Sizes."""
        return (self._counted(KEEP).kept - self._counted(RECOMPUTE).kept) / self.blocks

    def transient(self, plan_memory: float, moved: bool, pairs: bool = False) -> float:
        """See Sizes."""
        found = self._counted(RECOMPUTE)
        came_back = 2 * self.kept(False) if moved else 0
        return max(found.forward, found.head, self._backward(found, plan_memory) + came_back)

    def transient_kept(self, plan_memory: float) -> float:
        """See Sizes."""
        found = self._counted(KEEP)
        return max(found.forward, found.head, self._backward(found, plan_memory))

    def work(self, again: int, pairs: bool) -> Work:
        """See Sizes."""
        share = (again + (again // 2 if pairs else 0)) / self.blocks
        if share in (0, 1):
            found = self._counted(RECOMPUTE if share else KEEP)
            return Work(found.operations, found.moved)
        once, twice = self._counted(KEEP), self._counted(RECOMPUTE)
        operations, moved = (
            a + share * (b - a) for a, b in ((once.operations, twice.operations), (once.moved, twice.moved))
        )
        return Work(operations, moved)

    def _backward(self, found: Counted, plan_memory: float) -> float:
        return max(found.backward, found.attention + self.aside(self.passes.heads.projected) + plan_memory)

    def _counted(self, policy: str) -> Counted:
        return self.passes.over(self.tokens, policy)


class Passes:
    """Passes of a model over any number of tokens, each counted once.

    Args:
        config: of a run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._found: dict[tuple[int, int, str], Counted] = {}
        self._heads: Heads | None = None

    @functools.cached_property
    def whole(self) -> Pretrained:
        """The model, on the meta device."""
        return self._model()

    @property
    def heads(self) -> Heads:
        """Of the layer whose attention is widest."""
        if self._heads is None:
            self._counted(1, self._fewest, KEEP)
        assert self._heads is not None
        return self._heads

    def over(self, tokens: int, policy: str) -> Counted:
        """A pass over so many tokens, with all layers kept or computed again."""
        if tokens <= 3 * self._tile:
            return self._of_all_layers(tokens, policy)
        two, three = (self._of_all_layers(tiles * self._tile, policy) for tiles in (2, 3))
        return _further(two, three, tokens / self._tile - 2)

    def _of_all_layers(self, tokens: int, policy: str) -> Counted:
        layers, few = len(self.whole.layers), self._fewest
        if few == layers:
            return self._counted(tokens, layers, policy)
        one, two = (self._counted(tokens, each, policy) for each in (few, few + 1))
        return _further(one, two, layers - few)

    @functools.cached_property
    def _tile(self) -> int:
        """Tokens of the longest tile, of which feed-forwards have one where they are not in tiles."""
        widths = [width_of(part) for part in feed_forwards(self.whole.model)]
        return TILE_ELEMENTS[GPU.type] // min(widths, default=1 << 12)

    @functools.cached_property
    def _fewest(self) -> int:
        """Layers from which on each more takes as much as the one before."""
        kinds = {
            (type(layer), *((name, weight.shape, weight.requires_grad) for name, weight in layer.named_parameters()))
            for layer in self.whole.layers
        }
        layers = len(self.whole.layers)
        return FEWEST if len(kinds) == 1 and layers > FEWEST else layers

    def _model(self, layers: int | None = None) -> Pretrained:
        config = self.config
        given = (config.train.seqlen, config.lora, config.seed)
        with _aside():  # it was built before, or will be
            return Pretrained(config.model, None, None, dtype_of(config), *given, read=False, layers=layers)

    def _counted(self, tokens: int, layers: int, policy: str) -> Counted:
        if (tokens, layers, policy) not in self._found:
            model, master = self._model(layers), self.config.engine.name == "ddp"
            try:
                with _aside():
                    found, self._heads = count(model, tokens, policy, master)
            except RingflashError:
                raise
            except Exception as error:  # models may do anything; what one does not do here it may do in a run
                said = " ".join(f"{type(error).__name__}: {error}".split())
                raise ArgumentError(
                    f"model.path={self.config.model.path}: no pass of a {type(model.model).__name__} can be counted "
                    f"without values: {said}"
                ) from error
            self._found[tokens, layers, policy] = found
        return self._found[tokens, layers, policy]


@contextlib.contextmanager
def _aside() -> Generator[None]:
    """Draw no random numbers of the run, and log nothing: of a pass that fails torch does so in fifty lines."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.disable(before)


def _further(one: Counted, two: Counted, steps: float) -> Counted:
    """So many steps from one, in each of which as much is added as from it to another."""
    return Counted(*(a + (b - a) * steps for a, b in zip(one, two, strict=True)))


@dataclass(frozen=True)
class _Of:
    """What passes depend on, and the configuration that says it."""

    key: tuple
    config: Config = field(compare=False)


def passes_of(config: Config) -> Passes:
    """Those of its model; the same for all configurations whose passes are alike."""
    key = repr(config.model), repr(config.lora), dtype_of(config), config.engine.name == "ddp"
    return _passes(_Of(key, config))


@functools.lru_cache(maxsize=4)
def _passes(of: _Of) -> Passes:
    return Passes(of.config)
