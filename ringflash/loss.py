"""Cross entropy of a long shard without its logits.

Logits of 32,768 tokens over a vocabulary of 128,256 are 17 GB in fp32. Here they exist for one chunk of tokens at a
time, and the chunk's gradients are taken while they do: the backward pass only scales what the forward pass kept,
(T, C) for the activations and (V, C) for the weight, and no product is computed twice.

Legend: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflash.parallel.labels import IGNORED_LABEL, as_int64, check_labels

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits that may exist at once: as many as stay in a core's cache, or as keep a GPU busy (512 MiB in fp32)."""


class Head(NamedTuple):
    """What makes logits of activations: softcap * tanh(scale * (x weight^T + bias) / softcap).

    Attributes:
        weight: (V, C); used in the dtype of x.
        bias: (V,) or None.
        scale: factor of the logits.
        softcap: bound of the logits (Gemma 2); 0 for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, x_TC: Tensor) -> Tensor:
        """(T, V) fp32."""
        logits = x_TC @ self.weight.T if self.bias is None else torch.addmm(self.bias, x_TC, self.weight.T)
        logits = logits.float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if not self.softcap else logits.div_(self.softcap).tanh_().mul_(self.softcap)


def cross_entropy_sum(
    x_TC: Tensor,
    weight_VC: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    at_once: int | None = None,
) -> Tensor:
    """Sum over valid tokens of -log softmax(logits)[label], scalar fp32, differentiable in x, weight and bias.

    Args:
        x_TC: (T, C) activations.
        weight_VC: (V, C) output head; used in the dtype of x.
        labels_T: (T,) integers from 0 to V - 1; IGNORED_LABEL where nothing is to be predicted.
        bias_V: (V,) of the head.
        scale: see `Head`.
        softcap: see `Head`.
        at_once: logits that may exist at once; None: as `CHUNK_ELEMENTS` says for the device of x.

    Raises:
        ArgumentError: another label; on a GPU, which is not waited for, a device-side assertion, as torch's own.
    """
    labels_T, at_once = _checked(labels_T, weight_VC), at_once or CHUNK_ELEMENTS[x_TC.device.type]
    return _CrossEntropySum.apply(x_TC, weight_VC, labels_T, bias_V, scale, softcap, at_once)


@torch.no_grad()
def cross_entropy(
    x_TC: Tensor,
    weight_VC: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Each token's cross entropy (T,) fp32, 0 where its label is IGNORED_LABEL; for evaluation.

    Arguments are those of `cross_entropy_sum`; a rank may hold no token.
    """
    labels_T = _checked(labels_T, weight_VC)
    bias_V = None if bias_V is None else bias_V.to(x_TC.dtype)
    head = Head(weight_VC.to(x_TC.dtype), bias_V, scale, softcap)
    losses = x_TC.new_empty(len(x_TC), dtype=torch.float32)
    for rows in _chunks(x_TC, head, CHUNK_ELEMENTS[x_TC.device.type]):
        losses[rows] = _chunk(head.logits(x_TC[rows]), labels_T[rows])[0]
    return losses


def valid_tokens(labels: Tensor) -> Tensor:
    """Number of labels that count, a scalar int64 tensor."""
    return (labels != IGNORED_LABEL).sum()


def _checked(labels: Tensor, weight: Tensor) -> Tensor:
    labels = as_int64("labels", labels)
    check_labels("labels", labels, weight.shape[0])
    return labels


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float,
        at_once: int,
    ) -> Tensor:
        need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        ctx.weight_dtype = weight.dtype
        head = Head(weight.to(x.dtype), None if bias is None else bias.to(x.dtype), scale, softcap)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(head.weight, dtype=torch.float32) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, head, at_once):
            logits = head.logits(x[rows])
            slope = 1 - (logits / softcap).square() if softcap else None
            losses, softmax = _chunk(logits, labels[rows])
            total += losses.sum()
            dlogits = _logit_gradient(softmax, labels[rows])
            if slope is not None:
                dlogits *= slope
            if scale != 1.0:
                dlogits *= scale
            if dbias is not None:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(x.dtype)
            if dx is not None:
                dx[rows] = dlogits @ head.weight
            if dweight is not None:
                dweight += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dweight, dbias)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        dx, dweight, dbias = ctx.saved_tensors
        dx = None if dx is None else (dx * dtotal).to(dx.dtype)
        dweight, dbias = (None if d is None else (d * dtotal).to(ctx.weight_dtype) for d in (dweight, dbias))
        return dx, dweight, None, dbias, None, None, None


def _chunks(x: Tensor, head: Head, at_once: int) -> list[slice]:
    size = max(1, at_once // head.weight.shape[0])
    return [slice(begin, begin + size) for begin in range(0, x.shape[0], size)]


def _chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies and softmax of some tokens; overwrites the logits, takes one pass of exponentials."""
    picked = logits.gather(-1, _columns(labels))[:, 0]
    largest = logits.amax(-1)
    softmax = logits.sub_(largest[:, None]).exp_()
    total = softmax.sum(-1)
    losses = (largest + total.log() - picked).masked_fill(labels == IGNORED_LABEL, 0.0)
    return losses, softmax.div_(total[:, None])


def _logit_gradient(softmax: Tensor, labels: Tensor) -> Tensor:
    """Softmax - onehot(label), zero rows where the label is ignored; overwrites the softmax."""
    softmax.scatter_add_(-1, _columns(labels), softmax.new_full((len(labels), 1), -1.0))
    return softmax.masked_fill_((labels == IGNORED_LABEL)[:, None], 0.0)


def _columns(labels: Tensor) -> Tensor:
    """Where each token's logit is, (T, 1); anywhere for ignored ones. Other negative labels are left to be refused."""
    return labels.masked_fill(labels == IGNORED_LABEL, 0)[:, None]
