"""Attention over all ranks of a group as PyTorch operators, `ringflash::attention` and its backward.

They are opaque to torch.compile, known to autograd, and can be named in a selective-checkpoint policy. Operators take
no Python objects, so a sharding comes as its handle, a small tensor whose values do not become compile-time constants.
Traced code that has a mask and lengths instead passes them as one text, a request that the operator looks up. Tensors
and numbers mean what `call.Inputs` and `call.Settings` say of the arguments of the same name.

They are registered with the dispatcher by hand: `torch.library.custom_op` walks over the schema of each call that
needs gradients, 0.1 ms for about 20 arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ringflash.errors import UnsupportedError
from ringflash.kernels.devices import on_device_without_autocast
from ringflash.kernels.torch_private import (
    OpOverload,
    any_requires_grad,
    apply_unbound,
    below_autograd,
    never_compiled,
    nobody_listens,
    only_functionalized,
    transforms_active,
)
from ringflash.parallel.execution.call import NEEDS, Inputs, Settings, keeps, shape_of_table
from ringflash.parallel.execution.head_groups import backward, forward
from ringflash.parallel.handles import HELD


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor | None,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    key_visible: Tensor | None,
    blocks: Tensor | None,
    sinks: Tensor | None,
    request: str,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
    dropout: float,
    kernel: str,
    deterministic: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks; see `head_groups.forward`."""
    inputs = Inputs(query, key, value, handle, boundaries, query_boundaries, slopes, seed, key_visible, blocks, sinks)
    settings = Settings(request, sizes, scale, softcap, dropout, kernel, deterministic, needs)
    with on_device_without_autocast(query):
        return forward(inputs, settings)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor | None,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    key_visible: Tensor | None,
    blocks: Tensor | None,
    sinks: Tensor | None,
    request: str,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
    dropout: float,
    kernel: str,
    deterministic: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention` by query, key, value and sinks, those in `needs`; see `head_groups.backward`."""
    inputs = Inputs(query, key, value, handle, boundaries, query_boundaries, slopes, seed, key_visible, blocks, sinks)
    settings = Settings(request, sizes, scale, softcap, dropout, kernel, deterministic, needs)
    with on_device_without_autocast(query):
        return backward(dout, dlse, out, lse, table, inputs, settings)


TENSORS = len(Inputs._fields)
"""How many of the first operator's arguments are tensors."""


NO_VMAP = (
    "attention does not run under torch.vmap: give the mapped dimension as the batch dimension of query, key and value "
    "instead"
)
NO_FORWARD_MODE = "attention has no forward-mode derivative (torch.func.jvp); take gradients in reverse"


def _attention_shapes(*arguments):  # noqa: ANN002, ANN202
    inputs, settings = Inputs(*arguments[:TENSORS]), Settings(*arguments[TENSORS:])
    query, value = inputs.query, inputs.value
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return out, lse, query.new_empty(shape_of_table(inputs, settings), dtype=torch.int32)


def _attention_backward_shapes(dout, dlse, out, lse, table, *arguments):  # noqa: ANN001, ANN002, ANN202
    inputs, settings = Inputs(*arguments[:TENSORS]), Settings(*arguments[TENSORS:])
    return tuple(
        x.new_empty(x.shape) if settings.needs & bit else inputs.query.new_empty(0)
        for x, bit in ((getattr(inputs, name), bit) for name, bit in NEEDS.items())
    )


class _Refusing(torch.autograd.Function):
    """What attention has no rule for, under the transformations of torch.func."""

    @staticmethod
    def vmap(info, in_dims, *_) -> None:  # noqa: ANN001, ANN002
        _refuse_vmap(info, in_dims)

    @staticmethod
    def jvp(ctx, *_) -> None:  # noqa: ANN001, ANN002
        raise UnsupportedError(NO_FORWARD_MODE)


class _Attention(_Refusing):
    @staticmethod
    def forward(*inputs):  # noqa: ANN002, ANN205
        return _below_autograd(_attention, _attend, inputs, TENSORS)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        tensors, settings = inputs[:TENSORS], Settings(*inputs[TENSORS:])
        if settings.sizes and keeps(Inputs(*tensors), settings):
            # Query, key and value are in output[2], as they crossed: their shapes are all that is wanted of them.
            tensors = (*(x.new_empty(()).expand(x.shape) for x in tensors[:3]), *tensors[3:])
        ctx.save_for_backward(*output, *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.settings = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.sharding = getattr(inputs[3], HELD, None)  # alive until the backward pass, whatever becomes of the handle

    @staticmethod
    # pyrefly: ignore[bad-override]  # torch's `*grads`: three here
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None, _):  # noqa: ANN001, ANN205
        others = len(ctx.settings)
        if dout is None and dlse is None:
            return (None,) * (TENSORS + others)
        saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[0]) if dout is None else dout
        inputs = (dout, dlse, *saved, *ctx.settings)
        if transformed():
            gradients = _AttentionBackward.apply(*inputs)
        elif torch.is_grad_enabled():
            gradients = _attention_backward(*inputs)
        else:  # without a graph of the gradients, which is as good as always, nobody has to look for one
            gradients = _below_autograd(_attention_backward, _attend_backward, inputs, TENSORS + 5)
        needs = Settings(*ctx.settings).needs
        of_query, of_key, of_value, of_sinks = [
            x if needs & bit else None for x, bit in zip(gradients, NEEDS.values(), strict=True)
        ]
        return (of_query, of_key, of_value, *(None,) * (TENSORS - 4), of_sinks, *(None,) * others)


class _AttentionAlone(_Attention):
    """Where it is known that nobody listens."""

    @staticmethod
    def forward(*inputs):  # noqa: ANN002, ANN205
        with below_autograd():
            return _attend(*inputs)


class _AttentionBackward(_Refusing):
    @staticmethod
    def forward(*inputs):  # noqa: ANN002, ANN205
        return _below_autograd(_attention_backward, _attend_backward, inputs, TENSORS + 5)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_) -> None:  # noqa: ANN001, ANN002
        raise UnsupportedError(
            "attention has no second derivative: its gradient cannot be differentiated again. Take the first gradient "
            "without create_graph=True, or use torch's scaled_dot_product_attention with SDPBackend.MATH"
        )


def transformed() -> bool:
    """Whether grad, vjp, jvp or vmap of torch.func is at work, which wants `_Attention.apply`, not the operator."""
    return not torch.compiler.is_compiling() and transforms_active() and not only_functionalized()


def _below_autograd(operator: OpOverload, function: Callable, inputs: tuple, tensors: int) -> tuple[Tensor, ...]:
    """What an operator gives, of whose arguments so many are tensors; from its function where nobody listens."""
    alone = not torch.compiler.is_compiling() and nobody_listens(inputs[:tensors])
    with below_autograd():
        return function(*inputs) if alone else operator(*inputs)


def _refuse_vmap(info, in_dims, *_) -> None:  # noqa: ANN001, ANN002
    raise UnsupportedError(NO_VMAP)


_library = torch.library.Library("ringflash", "FRAGMENT")


def _register(
    function: Callable, shapes: Callable, differentiable: type[torch.autograd.Function]
) -> tuple[OpOverload, Callable]:
    """Make an operator of a function, with shapes for tracing, a gradient, and a refusal under vmap.

    Returns:
        The operator, and the function as it is called below autograd.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    operator = getattr(torch.ops.ringflash, name).default

    def with_gradient(*inputs):  # noqa: ANN002, ANN202
        if torch.is_grad_enabled() and any_requires_grad(*inputs):
            if transformed():
                raise UnsupportedError(f"torch.ops.ringflash.{name} under torch.func; call ringflash's functions there")
            return apply_unbound(differentiable, *inputs)
        with below_autograd():
            return operator(*inputs)

    below = never_compiled(function)  # code that runs below a compiled frame is not to be compiled in turn
    _library.impl(name, below, "CompositeExplicitAutograd")
    _library.impl(name, with_gradient, "Autograd")
    torch.library.register_fake(f"ringflash::{name}", shapes, lib=_library)
    torch.library.register_vmap(f"ringflash::{name}", _refuse_vmap, lib=_library)
    return operator, below


_attention, _attend = _register(attention, _attention_shapes, _Attention)
_attention_backward, _attend_backward = _register(attention_backward, _attention_backward_shapes, _AttentionBackward)


def call_attention(*arguments):  # noqa: ANN002, ANN201
    """`torch.ops.ringflash.attention`, also under the transformations of torch.func, of which `grad` and `vjp` work."""
    if transformed():
        return _Attention.apply(*arguments)
    if torch.compiler.is_compiling() or not nobody_listens(arguments[:TENSORS]):
        return torch.ops.ringflash.attention.default(*arguments)
    if torch.is_grad_enabled() and any_requires_grad(*arguments):
        return apply_unbound(_AttentionAlone, *arguments)
    with below_autograd():
        return _attend(*arguments)


def call_attention_backward(*arguments):  # noqa: ANN002, ANN201
    """`torch.ops.ringflash.attention_backward`, for who keeps what the forward pass gave outside of autograd."""
    return _below_autograd(_attention_backward, _attend_backward, arguments, TENSORS + 5)
