"""What a forward and backward pass holds and does, counted in a pass of tensors that have no memory.

All of the pass runs but the operators themselves: modules, autograd, what `engine.memory` keeps and computes again. So
nothing here knows how a model is built. Memory counts from the operator that makes it until nothing holds it; that of
weights, of their gradients once they are complete, and of the batch does not.

Tensors stand for such of a CPU, whose operators torch knows everywhere. What depends on the device, sizes of tiles and
of chunks of logits, is as on a GPU.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ringflash.kernels.torch_private import FakeTensorMode, TorchDispatchMode, changes_tensors, storage_of, to_copy
from ringflash.loss import CHUNK_ELEMENTS
from ringflash.training.engines.materialise import materialise
from ringflash.training.model.pretrained import Pretrained
from ringflash.transformers.forward import forward_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")

FORWARD, HEAD, BACKWARD = "forward", "head", "backward"
"""Parts of a pass: layers, then the output head and the loss with their backward pass, then that of layers."""

OPERATORS = "ringflash"
"""Namespace of attention's operators."""


def _of_groups(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Operations of products of groups of rows with a matrix each: experts."""
    groups = len(a) if a.dim() == b.dim() == 3 else 1  # of others the groups are parts of one of the lengths
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


PRODUCTS = {**flop_registry, torch.ops.aten._grouped_mm: _of_groups}
"""Products of matrices, and what counts their operations; torch does not know of those of groups."""


class Counted(NamedTuple):
    """Of a pass over some tokens; bytes, but for `operations`.

    Attributes:
        kept: what stays of the layers for the backward pass.
        stream: of these, what a layer is given.
        forward: beside what is kept, at most, in the forward pass of the layers.
        head: likewise in the output head and the loss.
        backward: likewise in the backward pass of the layers.
        attention: likewise at the end of a backward pass of attention, with the gradients that it gives.
        operations: of products of matrices.
        moved: what all other operators but attention read and write.
    """

    kept: float
    stream: float
    forward: float
    head: float
    backward: float
    attention: float
    operations: float
    moved: float


class Heads(NamedTuple):
    """Of a layer's attention.

    Attributes:
        query: how many of queries.
        key: how many of keys and values.
        width: of a query's and a key's.
        value: of a value's.
    """

    query: int
    key: int
    width: int
    value: int

    @property
    def projected(self) -> int:
        """Elements of a token's query, key and value."""
        return self.query * self.width + self.key * (self.width + self.value)


def count(model: Pretrained, tokens: int, policy: str, master: bool) -> tuple[Counted, Heads]:
    """What a pass over one document holds and does.

    Args:
        model: on the meta device, of one rank; it is used up.
        tokens: of the document.
        policy: "keep" or "recompute" of `engine.memory`.
        master: weights that are trained are in fp32, and cast where they are used, as under DDP.
    """
    shard = model.shard({"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "cu_seqlens": [0, tokens]})
    forward = forward_of(model.model)
    forward.probed, forward.logits_at_once = True, CHUNK_ELEMENTS[GPU.type]
    model.keep(policy, GPU)
    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), _Counter()
    with fake, counter, torch.autograd.set_multithreading_enabled(False):
        dtype = torch.float32 if master else model.dtype
        materialise(model, CPU, lambda *_: None, dtype, frozen=model.dtype)
        shard = {name: torch.empty_like(x) if isinstance(x, Tensor) else x for name, x in shard.items()}
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_drop_gradient)
        counter.watch(model.layers, [weight for weight in model.parameters() if weight.requires_grad])
        model(**shard).backward()
    return counter.counted(), counter.heads


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


class _Counter(TorchDispatchMode):
    """Counts what operators make, and when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads(0, 0, 0, 0)
        self._held: dict[int, weakref.ref] = {}
        self._weights: set[int] = set()
        self._live = self._casts = self._before = self._kept = self._stream = self._attention = 0
        self._most = {FORWARD: 0, HEAD: 0, BACKWARD: 0}
        self._part = FORWARD
        self._operations = self._moved = 0.0

    def watch(self, layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> None:
        """Begin with what is there now; a pass through these layers comes next.

        Args:
            layers: from the first to the last.
            weights: whose copies in another dtype are no part of what layers keep: autocast has them for longer.
        """
        self._before, self._weights = self._live, set(map(storage_of, weights))
        self._most = dict.fromkeys(self._most, 0)
        self._operations = self._moved = 0.0
        first = layers[0].register_forward_pre_hook(lambda *_: self._enter(first), prepend=True)
        last = layers[-1].register_forward_hook(lambda _, __, output: self._leave(last, output))

    def counted(self) -> Counted:
        """What was."""
        beside = self._before + self._kept
        return Counted(
            kept=self._kept,
            stream=self._stream,
            forward=self._most[FORWARD] - beside,
            head=self._most[HEAD] - beside,
            backward=self._most[BACKWARD] - beside,
            attention=self._attention - beside,
            operations=self._operations,
            moved=self._moved,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See TorchDispatchMode."""
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
        given = [x for x in args if isinstance(x, Tensor)]
        cast = func is to_copy and storage_of(given[0]) in self._weights
        for x in made:
            self._hold(x, cast)
        self._most[self._part] = max(self._most[self._part], self._live)
        if func.namespace == OPERATORS:
            self._see_attention(func, args)
        elif func.overloadpacket in PRODUCTS:
            self._operations += PRODUCTS[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif not func.is_view and "empty" not in func.__name__:
            places = set(map(storage_of, given))
            new = [x for x in made if storage_of(x) not in places]
            if new or changes_tensors(func):
                self._moved += sum(x.numel() * x.element_size() for x in (*given, *new))
        return out

    def _enter(self, hook: Any) -> None:
        hook.remove()
        self._kept = self._casts - self._live

    def _leave(self, hook: Any, output: Any) -> None:
        """The head comes next, until its gradient is there."""
        hook.remove()
        stream = output[0] if isinstance(output, tuple) else output
        self._kept += self._live - self._casts
        self._stream = stream.nbytes
        self._part = HEAD
        stream.register_hook(self._come_back)

    def _come_back(self, _: Tensor) -> None:
        self._part = BACKWARD
        self._most[BACKWARD] = self._live

    def _see_attention(self, func: Any, args: tuple) -> None:
        if func.__name__.startswith("attention_backward"):
            self._attention = max(self._attention, self._live)
        else:
            query, key, value = args[:3]
            found = Heads(query.shape[1], key.shape[1], query.shape[2], value.shape[2])
            self.heads = max(self.heads, found, key=lambda heads: heads.projected)

    def _hold(self, x: Tensor, cast: bool) -> None:
        storage = x.untyped_storage()
        place, size = storage_of(x), storage.nbytes()
        if place not in self._held:
            self._live += size
            self._casts += size if cast else 0
            self._held[place] = weakref.ref(storage, functools.partial(self._let_go, place, size, cast))

    def _let_go(self, place: int, size: int, cast: bool, _: weakref.ref) -> None:
        del self._held[place]
        self._live -= size
        self._casts -= size if cast else 0
