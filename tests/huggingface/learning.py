"""A model learns from a batch over the ranks of a pool, and is compared with one device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from batches import gradients
from families import build
from torch import Tensor
from transformers import PreTrainedModel

from ringflash.transformers import SequenceParallel

LOSS, GRADIENT = 1e-5, 2e-5
"""Largest error: of the loss, of itself; of a parameter's gradient, of the largest element of that gradient."""


def learn(model: PreTrainedModel, batch: Mapping, fused: bool = False, **options: object) -> dict:
    """This rank's part of a step on a whole batch, and what an engine that averages over ranks makes of it."""
    sequence = SequenceParallel(model, **options)
    if fused:
        sequence.fuse_loss()
    loss = model(**sequence.shard(batch), use_cache=False).loss
    loss.backward()
    return {
        "mean": over_ranks(loss.detach().clone()),
        "reported": sequence.reported(loss),
        "gradients": {name: over_ranks(x) for name, x in gradients(model).items()},
    }


def over_ranks(x: Tensor) -> Tensor:
    """Mean over the ranks of the default group."""
    dist.all_reduce(x)
    return x / dist.get_world_size()


def learn_family(family: str, batch: Mapping, **options: object) -> dict:
    """`learn` for the ranks of a pool, which build the model themselves. Gradients come back from rank 0 alone."""
    learned = learn(build(family, "ring"), batch, **options)
    if dist.get_rank() > 0:
        learned["gradients"] = None
    return learned


def assert_learned(results: list[dict], loss: Tensor, expected: Mapping[str, Tensor], of_model: bool = False) -> None:
    """The ranks' results are one device's loss and gradients."""
    for learned in results:
        assert_same_loss(learned["mean"], loss)
        torch.testing.assert_close(learned["reported"], learned["mean"], rtol=1e-6, atol=0)
        assert not learned["reported"].requires_grad
    assert_same_gradients(results[0]["gradients"], expected, of_model)


def assert_same_loss(found: Tensor, expected: Tensor) -> None:
    """A loss, up to roundings of fp32."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=LOSS, atol=0)


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_model: bool = False) -> None:
    """Each parameter's gradient, up to roundings of fp32.

    Args:
        found: by name.
        expected: by name.
        of_model: measure by the model's largest gradient, where a parameter's own may be zero but for roundings: of
            queries that see a single key.
    """
    assert found.keys() == expected.keys()
    largest = {name: x.abs().max().item() for name, x in expected.items()}
    for name, gradient in expected.items():
        tolerance = GRADIENT * (max(largest.values()) if of_model else largest[name])
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
