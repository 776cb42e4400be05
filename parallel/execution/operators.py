"""Attention over all ranks of a group as PyTorch operators, `ringflash::attention` and its backward.

They are opaque to torch.compile, known to autograd, and can be named in a selective-checkpoint policy. Operators take
no Python objects, so mask and partition come as text and the group by its name. Document boundaries come as a tensor,
whose values do not become compile-time constants, or, where they are constants anyway, as text. Tensors and numbers
mean what `call.Inputs` and `call.Call` say of the arguments of the same name.

They are registered with the dispatcher by hand: `torch.library.custom_op` walks over the schema of each call that
needs gradients, 0.1 ms for about 20 arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ringflash.errors import UnsupportedError
from ringflash.kernels.devices import on_device_without_autocast
from ringflash.parallel.execution.call import Call, Inputs, shape_of_table
from ringflash.parallel.execution.executor import backward, forward


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    key_visible: Tensor | None,
    mask: str,
    documents: str,
    partition: str,
    group: str,
    batch: int,
    seqlen: int,
    key_seqlen: int,
    scale: float,
    softcap: float,
    dropout: float,
    kernel: str,
    deterministic: bool,
    sinks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks; see `executor.forward`."""
    inputs = Inputs(query, key, value, boundaries, query_boundaries, slopes, seed, key_visible)
    call = Call(
        mask, documents, partition, group, batch, seqlen, key_seqlen, scale, softcap, dropout, kernel, deterministic,
        sinks,
    )  # fmt: skip
    with on_device_without_autocast(query):
        return forward(inputs, call)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    key_visible: Tensor | None,
    mask: str,
    documents: str,
    partition: str,
    group: str,
    batch: int,
    seqlen: int,
    key_seqlen: int,
    scale: float,
    softcap: float,
    dropout: float,
    kernel: str,
    deterministic: bool,
    sinks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` by query, key and value; see `executor.backward`."""
    inputs = Inputs(query, key, value, boundaries, query_boundaries, slopes, seed, key_visible)
    call = Call(
        mask, documents, partition, group, batch, seqlen, key_seqlen, scale, softcap, dropout, kernel, deterministic,
        sinks,
    )  # fmt: skip
    with on_device_without_autocast(query):
        return backward(dout, dlse, out, lse, table, inputs, call)


TENSORS = len(Inputs._fields)
"""How many of the first operator's arguments are tensors."""


NO_VMAP = (
    "attention does not run under torch.vmap: give the mapped dimension as the batch dimension of query, key and value "
    "instead"
)
NO_FORWARD_MODE = "attention has no forward-mode derivative (torch.func.jvp); take gradients in reverse"


def _attention_shapes(*arguments):  # noqa: ANN002, ANN202
    inputs, call = Inputs(*arguments[:TENSORS]), Call(*arguments[TENSORS:])
    query, value = inputs.query, inputs.value
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return out, lse, query.new_empty(shape_of_table(call, inputs), dtype=torch.int32)


def _attention_backward_shapes(dout, dlse, out, lse, table, query, key, value, *rest):  # noqa: ANN001, ANN002, ANN202
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


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
        return _below_autograd(_attention, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        ctx.save_for_backward(*output, *inputs[:TENSORS])
        ctx.mark_non_differentiable(output[2])
        ctx.settings = inputs[TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None, _):  # noqa: ANN001, ANN205
        nothing = (None,) * (TENSORS - 3 + len(ctx.settings))
        if dout is None and dlse is None:
            return (None, None, None, *nothing)
        saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[0]) if dout is None else dout
        inputs = (dout, dlse, *saved, *ctx.settings)
        if transformed():
            return (*_AttentionBackward.apply(*inputs), *nothing)
        # Without a graph of the gradients, which is as good as always, nobody has to look for one.
        gradients = (
            _attention_backward(*inputs) if torch.is_grad_enabled() else _below_autograd(_attention_backward, inputs)
        )
        return (*gradients, *nothing)


class _AttentionBackward(_Refusing):
    @staticmethod
    def forward(*inputs):  # noqa: ANN002, ANN205
        return _below_autograd(_attention_backward, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_) -> None:  # noqa: ANN001, ANN002
        raise UnsupportedError(
            "attention has no second derivative: its gradient cannot be differentiated again. Take the first gradient "
            "without create_graph=True, or use torch's scaled_dot_product_attention with SDPBackend.MATH"
        )


def mapped(*arguments: object) -> bool:
    """Whether one of the arguments is a tensor that stands for several under torch.vmap."""
    if not torch._C._are_functorch_transforms_active():
        return False
    for x in arguments:
        while isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            if torch._C._functorch.is_batchedtensor(x):
                return True
            x = torch._C._functorch.get_unwrapped(x)
    return False


def transformed() -> bool:
    """Whether grad, vjp, jvp or vmap of torch.func is at work, which wants `_Attention.apply`, not the operator."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return torch._C._functorch.peek_interpreter_stack().key() != torch._C._functorch.TransformType.Functionalize


def _below_autograd(operator: torch._ops.OpOverload, inputs: tuple) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def _refuse_vmap(info, in_dims, *_) -> None:  # noqa: ANN001, ANN002
    raise UnsupportedError(NO_VMAP)


_library = torch.library.Library("ringflash", "FRAGMENT")


def _register(
    function: Callable, shapes: Callable, differentiable: type[torch.autograd.Function]
) -> torch._ops.OpOverload:
    """Make an operator of a function, with shapes for tracing, a gradient, and a refusal under vmap."""
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    operator = getattr(torch.ops.ringflash, name).default

    def with_gradient(*inputs):  # noqa: ANN002, ANN202
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if transformed():
                raise UnsupportedError(f"torch.ops.ringflash.{name} under torch.func; call ringflash's functions there")
            # Function.apply binds the arguments' names first, for 10 us; torch.func alone has need of it.
            return super(torch.autograd.Function, differentiable).apply(*inputs)
        return _below_autograd(operator, inputs)

    # Code that runs below a compiled frame is not to be compiled in turn.
    _library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    _library.impl(name, with_gradient, "Autograd")
    torch.library.register_fake(f"ringflash::{name}", shapes, lib=_library)
    torch.library.register_vmap(f"ringflash::{name}", _refuse_vmap, lib=_library)
    return operator


_attention = _register(attention, _attention_shapes, _Attention)
_attention_backward = _register(attention_backward, _attention_backward_shapes, _AttentionBackward)


def call_attention(*arguments):  # noqa: ANN002, ANN201
    """`torch.ops.ringflash.attention`, also under the transformations of torch.func, of which `grad` and `vjp` work."""
    operator = _Attention.apply if transformed() else torch.ops.ringflash.attention.default
    return operator(*arguments)
