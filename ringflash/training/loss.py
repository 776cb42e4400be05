"""Cross entropy of a long shard without its logits.

Logits of 32,768 tokens over a vocabulary of 128,256 are 17 GB in fp32. Here they exist for one chunk of tokens at a
time, and the chunk's gradients are taken while they do: the backward pass only scales what the forward pass kept,
(T, C) for the activations and (V, C) for the weight, and no product is computed twice.

Legend: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.sharding import IGNORED_LABEL

CHUNK_ELEMENTS = 2**25
"""Logits that may exist at once: 128 MiB in fp32."""


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
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.weight_dtype = weight.dtype
        weight = weight.to(x.dtype)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, weight):
            losses, logits, log_sum = _chunk(x[rows], weight, labels[rows])
            total += losses.sum()
            if need_x or need_weight:
                dlogits = _logit_gradient(logits, log_sum, labels[rows]).to(x.dtype)
            if need_x:
                dx[rows] = dlogits @ weight
            if need_weight:
                dweight += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dtotal: Tensor) -> tuple:
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else (dx * dtotal).to(dx.dtype)
        dweight = None if dweight is None else (dweight * dtotal).to(ctx.weight_dtype)
        return dx, dweight, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(begin, begin + size) for begin in range(0, x.shape[0], size)]


def _chunk(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = (x @ weight.T).float()
    log_sum = logits.logsumexp(-1)
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return (log_sum - picked).masked_fill(labels == IGNORED_LABEL, 0.0), logits, log_sum


def _logit_gradient(logits: Tensor, log_sum: Tensor, labels: Tensor) -> Tensor:
    """Softmax - onehot(label), zero rows where the label is ignored; overwrites the logits."""
    gradient = logits.sub_(log_sum[:, None]).exp_()
    gradient.scatter_add_(-1, labels.clamp(min=0)[:, None], torch.full_like(log_sum, -1.0)[:, None])
    return gradient.masked_fill_((labels == IGNORED_LABEL)[:, None], 0.0)
