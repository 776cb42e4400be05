"""Cross entropy of a long shard without its logits.

Logits of 32,768 tokens over a vocabulary of 128,256 are 17 GB in fp32. Here they exist for one chunk of tokens at a
time, and the chunk's gradients are taken while they do: the backward pass only scales what the forward pass kept,
(T, C) for the activations and (V, C) for the weight, and no product is computed twice.

Legend: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.parallel.sharding import IGNORED_LABEL

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits that may exist at once: as many as stay in a core's cache, or as keep a GPU busy (512 MiB in fp32)."""


def cross_entropy_sum(x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over valid tokens of -log softmax(x weight^T)[label], scalar fp32, differentiable in x and weight.

    Args:
        x_TC: (T, C) activations.
        weight_VC: (V, C) output head; used in the dtype of x.
        labels_T: (T,) int64; IGNORED_LABEL where nothing is to be predicted.
    """
    return _CrossEntropySum.apply(x_TC, weight_VC, labels_T)


@torch.no_grad()
def cross_entropy(x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor) -> Tensor:
    """Each token's cross entropy (T,) fp32, 0 where its label is IGNORED_LABEL; for evaluation."""
    weight_VC = weight_VC.to(x_TC.dtype)
    losses = [_chunk(x_TC[rows], weight_VC, labels_T[rows])[0] for rows in _chunks(x_TC, weight_VC)]
    return torch.cat(losses)


def valid_tokens(labels: Tensor) -> Tensor:
    """Number of labels that count, a scalar int64 tensor."""
    return (labels != IGNORED_LABEL).sum()


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.weight_dtype = weight.dtype
        weight = weight.to(x.dtype)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, weight):
            losses, softmax = _chunk(x[rows], weight, labels[rows])
            total += losses.sum()
            dlogits = _logit_gradient(softmax, labels[rows]).to(x.dtype)
            if dx is not None:
                dx[rows] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else (dx * dtotal).to(dx.dtype)
        dweight = None if dweight is None else (dweight * dtotal).to(ctx.weight_dtype)
        return dx, dweight, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS[x.device.type] // weight.shape[0])
    return [slice(begin, begin + size) for begin in range(0, x.shape[0], size)]


def _chunk(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies and softmax of some tokens; one buffer of logits, one pass of exponentials."""
    logits = (x @ weight.T).float()
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    largest = logits.amax(-1)
    softmax = logits.sub_(largest[:, None]).exp_()
    total = softmax.sum(-1)
    losses = (largest + total.log() - picked).masked_fill(labels == IGNORED_LABEL, 0.0)
    return losses, softmax.div_(total[:, None])


def _logit_gradient(softmax: Tensor, labels: Tensor) -> Tensor:
    """Softmax - onehot(label), zero rows where the label is ignored; overwrites the softmax."""
    softmax.scatter_add_(-1, labels.clamp(min=0)[:, None], softmax.new_full((len(labels), 1), -1.0))
    return softmax.masked_fill_((labels == IGNORED_LABEL)[:, None], 0.0)
