"""torch.func: gradients are those of autograd; whatever attention has no rule for is refused in words of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, vjp, vmap

from ringflash import Mask, UnsupportedError
from ringflash.functional import attention
from ringflash.parallel.mesh import ONE_DEVICE

QUERY, KEY, VALUE = torch.randn(1, 5, 4, 8), torch.randn(1, 7, 2, 8), torch.randn(1, 7, 2, 8)


def outputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return attention(query, key, value, mask=Mask.causal(), group=ONE_DEVICE)


def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, lse = outputs(query.sin(), key, value)
    return out.square().sum() + lse.sum()


def of_autograd() -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEY, VALUE)]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_grad_is_that_of_autograd() -> None:
    for found, expected in zip(grad(loss, argnums=(0, 1, 2))(QUERY, KEY, VALUE), of_autograd(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_grad_of_one_argument_leaves_the_others_to_autograd_outside() -> None:
    # Autograd outside sees the function's value, not only its gradient.
    key = KEY.clone().requires_grad_()
    value, pull = vjp(lambda query: loss(query, key, VALUE), QUERY)
    torch.testing.assert_close(torch.autograd.grad(value, key)[0], of_autograd()[1], rtol=1e-6, atol=1e-6)
    assert pull(torch.ones(()))[0].shape == QUERY.shape


def test_vjp_of_one_output_only() -> None:
    _, pull = vjp(lambda *x: outputs(*x)[1].sum(), QUERY, KEY, VALUE)
    assert pull(torch.ones(()))[2].abs().max() < 1e-6  # the log-sum-exp does not depend on values
    assert pull(torch.ones(()))[0].abs().max() > 1e-3


def test_functionalize_changes_nothing() -> None:
    assert torch.equal(functionalize(loss)(QUERY, KEY, VALUE), loss(QUERY, KEY, VALUE))


def _outside() -> None:
    key = KEY.clone().requires_grad_()
    grad(loss)(QUERY, key, VALUE).sum().backward()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda: grad(lambda x: grad(loss)(x, KEY, VALUE).sum())(QUERY), "no second derivative"),
        (_outside, "no second derivative"),
        (lambda: jacfwd(loss)(QUERY, KEY, VALUE), "no forward-mode derivative"),
        (lambda: hessian(loss)(QUERY, KEY, VALUE), "no forward-mode derivative"),
        (lambda: jacrev(outputs)(QUERY, KEY, VALUE), "vmap.*batch dimension"),
        (lambda: vmap(loss)(*(x[None] for x in (QUERY, KEY, VALUE))), "vmap.*batch dimension"),
        (lambda: vmap(grad(loss))(*(x[None] for x in (QUERY, KEY, VALUE))), "vmap.*batch dimension"),
        (lambda: vmap(loss, in_dims=(None, None, 0))(QUERY, KEY, VALUE[None]), "vmap.*batch dimension"),
    ],
    ids=["twice", "from_outside", "forward", "hessian", "jacobian", "vmap", "per_sample", "vmap_of_values"],
)
def test_what_attention_has_no_rule_for_is_refused_in_its_own_words(transform: Callable, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        transform()
