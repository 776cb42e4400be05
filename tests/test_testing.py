"""The checking tools find what is wrong, and nothing where nothing is."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ringflash import ArgumentError, flash_attn_func, testing
from ringflash.testing import value_and_grad_difference

Q, K = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)


def torchs(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def ours(q, k, v):
    return flash_attn_func(q, k, v, causal=True)


def test_two_right_functions_differ_by_rounding() -> None:
    differences = value_and_grad_difference(ours, torchs, Q, K, K)
    assert [x.name for x in differences] == ["output 0", *(f"gradient of input {i}" for i in range(3))]
    assert max(x.largest for x in differences) < 1e-5
    assert max(x.relative for x in differences) < 1e-5


def test_a_wrong_gradient_is_found_where_it_is() -> None:
    def wrong(q, k, v):
        return torchs(q, k.detach() + 0 * k, v)

    by_name = {x.name: x.relative for x in value_and_grad_difference(wrong, torchs, Q, K, K)}
    assert by_name.pop("gradient of input 1") == pytest.approx(1.0)
    assert max(by_name.values()) < 1e-5


def test_inputs_keep_their_gradients_and_numbers_may_be_inputs() -> None:
    leaf = Q.clone().requires_grad_()
    differences = value_and_grad_difference(lambda x, n: x * n, lambda x, n: x + x, leaf, 2)
    assert [(x.name, x.largest) for x in differences] == [("output 0", 0.0), ("gradient of input 0", 0.0)]
    assert leaf.grad is None


def test_infinities_and_missing_results() -> None:
    edge, same = torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, torch.inf])
    assert value_and_grad_difference(lambda: (edge, None), lambda: edge)[0].largest == 0.0
    assert value_and_grad_difference(lambda: edge, lambda: same)[0].largest == torch.inf
    assert value_and_grad_difference(lambda: edge * torch.nan, lambda: edge)[0].largest == torch.inf
    with pytest.raises(ArgumentError, match="different tensors"):
        value_and_grad_difference(lambda: edge, lambda: edge[:1])


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "HEAD_DIMS", (16,))
    monkeypatch.setattr(sys, "argv", ["testing", "--tokens", "40", "--device", "cpu"])


@pytest.mark.usefixtures("small_grid")
def test_the_command_passes_right_kernels(capsys: pytest.CaptureFixture) -> None:
    assert testing.main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 9 * 3 * 2 + 1
    assert "All within the rule" in rows[-1]


@pytest.mark.usefixtures("small_grid")
def test_the_command_fails_wrong_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    attention = testing.attention

    def one_key_too_many(q, k, v, mask, **rest):
        return attention(q, k, v, mask=mask if mask.right is None else testing.Mask(right=mask.right + 1), **rest)

    monkeypatch.setattr(testing, "attention", one_key_too_many)
    assert testing.main() == 1
    broken = [row.split()[0] for row in capsys.readouterr().out.splitlines() if "too far: out" in row]
    assert broken.count("causal") == 6
    assert "full" not in broken
