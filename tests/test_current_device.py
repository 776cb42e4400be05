"""Kernels are launched on the device of the tensors, whichever is the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ringflash import flash_attn_with_kvcache
from ringflash.flash_attn import kvcache
from ringflash.functional import attention
from ringflash.kernels.devices import on_device_without_autocast
from ringflash.parallel.execution import operators
from ringflash.parallel.mesh import ONE_DEVICE


@pytest.fixture(params=[0, 1])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Number of the GPU that tensors seem to be on; torch.cuda.current_device() is 0 but where it is switched."""
    current = [0]

    @contextmanager
    def switched(to: torch.device) -> Iterator[None]:
        current.append(to.index)
        yield
        current.pop()

    with FakeTensorMode():
        there = torch.empty(1, device=torch.device("cuda", request.param))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switched)
    for module in (kvcache, operators):
        monkeypatch.setattr(module, "on_device_without_autocast", lambda x: on_device_without_autocast(there))
    yield request.param
    assert current == [0]


def seen(function: Callable, found: list[int]) -> Callable:
    """`function`, which notes the current device."""

    def call(*arguments: object) -> object:
        found.append(torch.cuda.current_device())
        return function(*arguments)

    return call


def test_attention_and_its_gradient(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(operators, "forward", seen(operators.forward, found))
    monkeypatch.setattr(operators, "backward", seen(operators.backward, found))
    query = torch.randn(1, 8, 2, 16, requires_grad=True)
    out, _ = attention(query, query, query, group=ONE_DEVICE)
    out.sum().backward()
    assert found == [device, device]


def test_attention_to_a_cache(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def attend(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return query.clone(), query.new_zeros(1, 2, 1)

    kernels = SimpleNamespace(append=seen(lambda *_: None, found), attend=seen(attend, found))
    monkeypatch.setattr(kvcache, "select_decoding", lambda *_: kernels)
    x = torch.zeros(1, 1, 2, 16)
    flash_attn_with_kvcache(x, x.clone(), x.clone(), x, x, cache_seqlens=0)
    assert found == [device, device]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kernel", ["hopper", "triton"])
def test_attention_on_a_gpu_that_is_not_the_current_one(kernel: str) -> None:
    results = []
    for place in (0, 1):
        torch.manual_seed(0)
        leaves = [
            torch.randn(1, 300, 4, 64).to("cuda:" + str(place), torch.bfloat16).requires_grad_() for _ in range(3)
        ]
        out, lse = attention(*leaves, group=ONE_DEVICE, kernel=kernel, deterministic=True)
        gradients = torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)
        results.append([x.cpu() for x in (out, lse, *gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
