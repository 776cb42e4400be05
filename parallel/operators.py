"""Attention over all ranks of a group as PyTorch operators, `ringflash::attention` and its backward.

They are opaque to torch.compile, known to autograd, and can be named in a selective-checkpoint policy. Operators take
no Python objects, so mask and partition come as text, the group by its name, and document boundaries as a tensor
(their values must not become compile-time constants). Tensors and numbers mean what `call.Inputs` and `call.Call`
say of the arguments of the same name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import UnsupportedError
from ringflash.parallel.call import Call, Inputs
from ringflash.parallel.executor import backward, forward


@torch.library.custom_op("ringflash::attention", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks; see `executor.forward`."""
    inputs = Inputs(query, key, value, boundaries, query_boundaries, slopes, seed, key_visible)
    call = Call(
        mask, partition, group, batch, seqlen, key_seqlen, scale, softcap, dropout, kernel, deterministic
    )  # fmt: skip
    return forward(inputs, call)


@torch.library.custom_op("ringflash::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    key_visible: Tensor | None,
    mask: str,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` by query, key and value; see `executor.backward`."""
    inputs = Inputs(query, key, value, boundaries, query_boundaries, slopes, seed, key_visible)
    call = Call(
        mask, partition, group, batch, seqlen, key_seqlen, scale, softcap, dropout, kernel, deterministic
    )  # fmt: skip
    return backward(dout, dlse, out, lse, inputs, call)


@attention.register_fake
def _(query, key, value, *rest):  # noqa: ANN001, ANN002, ANN202
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@attention_backward.register_fake
def _(dout, dlse, out, lse, query, key, value, *rest):  # noqa: ANN001, ANN002, ANN202
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


TENSORS = 8
"""How many of the operator's arguments are tensors."""


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*output, *inputs[:TENSORS])
    ctx.settings = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, dlse: Tensor | None):  # noqa: ANN001, ANN202
    nothing = (None,) * (TENSORS - 3 + len(ctx.settings))
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    saved = ctx.saved_tensors
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    return (*attention_backward(dout, dlse, *saved, *ctx.settings), *nothing)


attention.register_autograd(_differentiate, setup_context=_save)


def _differentiate_twice(ctx, *_) -> None:  # noqa: ANN001, ANN002
    raise UnsupportedError(
        "attention has no second derivative: its gradient cannot be differentiated again. Take the first gradient "
        "without create_graph=True, or use torch's scaled_dot_product_attention with SDPBackend.MATH"
    )


attention_backward.register_autograd(_differentiate_twice)


def _vmap(info, in_dims, *_) -> None:  # noqa: ANN001, ANN002
    raise UnsupportedError(
        "attention does not run under torch.vmap: give the mapped dimension as the batch dimension of query, key and "
        "value instead"
    )


attention.register_vmap(_vmap)
attention_backward.register_vmap(_vmap)
