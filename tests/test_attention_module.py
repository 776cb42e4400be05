"""The module passes on everything that it is given: it equals the function with the same arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

import ringflash.attention
from ringflash import DistributedFlashAttention, Mask
from ringflash.functional import attention
from ringflash.parallel.mesh import ONE_DEVICE

BATCH, TOKENS, HEADS, KEY_HEADS, DIM = 2, 33, 4, 2, 16

SETTINGS = {
    "plain": {},
    "mask": {"mask": Mask.causal() & Mask.sliding_window(5)},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "one device": {"group": ONE_DEVICE},
}
INPUTS = {
    "documents": {"cu_seqlens": [0, 10, 40, 66]},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "padding": {"key_padding_mask": torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 5 != 2},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, TOKENS, heads, DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_functions(tensors, name):
    out, lse = DistributedFlashAttention(**SETTINGS[name]).forward_with_lse(*tensors)
    expected = attention(*tensors, **SETTINGS[name])
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    if name not in ("plain", "one device"):
        assert not torch.equal(out, attention(*tensors)[0])


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_the_functions(tensors, name):
    out = DistributedFlashAttention()(*tensors, **INPUTS[name])
    assert torch.equal(out, attention(*tensors, **INPUTS[name])[0])
    assert not torch.equal(out, attention(*tensors)[0])


def test_every_argument_reaches_the_function(tensors, monkeypatch):
    found = {}

    def note(query, key, value, **arguments):
        found.update(arguments)
        return query, None

    monkeypatch.setattr(ringflash.attention, "attention", note)
    settings = {
        "mask": Mask.bidirectional(),
        "group": ONE_DEVICE,
        "partition": "balanced",
        "head_ranks": 2,
        "scale": 0.3,
        "softcap": 2.0,
        "dropout": 0.1,
        "kernel": "triton",
        "deterministic": True,
    }
    forward = inspect.signature(DistributedFlashAttention.forward).parameters
    inputs = {name: object() for name in forward if name not in ("self", "query", "key", "value")}
    attend = DistributedFlashAttention(**settings)
    attend(*tensors, **inputs)
    assert found == settings | inputs | {"partition": None, "head_ranks": None}  # the sharding has its own
    assert found.keys() == inspect.signature(attention).parameters.keys() - {"query", "key", "value", "dropout_seed"}
    found.clear()
    attend.forward_with_lse(*tensors, **inputs)
    assert found == settings | inputs | {"partition": None, "head_ranks": None}


def test_dropout_drops_while_training_only(tensors):
    attend = DistributedFlashAttention(dropout=0.5)
    torch.manual_seed(3)
    dropped = attend(*tensors)
    torch.manual_seed(3)
    assert torch.equal(dropped, attention(*tensors, dropout=0.5)[0])
    assert torch.equal(attend.eval()(*tensors), attention(*tensors)[0])
    assert not torch.equal(dropped, attend(*tensors))
