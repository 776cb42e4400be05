"""Document boundaries that the host does not read, as cu_seqlens on a GPU: here those on the CPU are taken for such."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Rules, Tensors, assert_as_exact_as_torch, cases, solve, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringflash import ArgumentError, Mask, functional
from ringflash.functional import attention
from ringflash.parallel.execution.call import Inputs
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.planning import local_program

EVERY_FEATURE = {"softcap": 2.0, "alibi": "heads", "dropout": 0.4, "padding": True}
CASE = Case(((20, 25), (0, 4), (7, 7)), Rules(left=9, right=0, sink=2))


@pytest.fixture(autouse=True, scope="module")
def boundaries_that_the_host_must_not_read() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "on_device", lambda inputs: inputs.boundaries is not None)
        patch.setattr(functional, "on_a_device", lambda x: isinstance(x, Tensor))
        yield


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry for each time that boundaries are turned into rows."""
    found = []
    make = local_program.position_bounds
    monkeypatch.setattr(local_program, "position_bounds", lambda *rest: found.append(rest) or make(*rest))
    return found


def attend(case: Case, problem: Tensors) -> Callable[..., tuple[Tensor, Tensor]]:
    query_edges, key_edges = map(torch.as_tensor, case.edges())

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            query[None],
            key[None],
            value[None],
            mask=case.rules.mask(),
            cu_seqlens=key_edges,
            query_cu_seqlens=query_edges,
            seqlen=case.queries,
            key_seqlen=case.keys,
            group=ONE_DEVICE,
            scale=case.scale,
            softcap=case.softcap,
            alibi_slopes=problem.slopes,
            dropout=case.dropout,
            dropout_seed=problem.dropout_seed,
            key_padding_mask=None if problem.padding is None else problem.padding[None],
            sinks=sinks,
        )
        return out[0], lse[0]

    return call


@settings(max_examples=60)
@given(st.data())
def test_any_features_are_as_exact_as_torch(data: st.DataObject) -> None:
    case = data.draw(cases(torch.float32, dense=False))
    problem = tensors(case)
    assert_as_exact_as_torch(solve(attend(case, problem), problem), case, problem)


@pytest.mark.parametrize("features", [{}, EVERY_FEATURE], ids=["plain", "every feature"])
def test_the_backward_pass_takes_the_rows_of_the_forward_pass(features: dict, readings: list) -> None:
    problem = tensors(case := replace(CASE, **features))
    query, key, value = (x.requires_grad_() for x in (problem.query, problem.key, problem.value))
    out, _ = attend(case, problem)(query, key, value, None)
    assert len(readings) == 1
    out.sum().backward()
    assert len(readings) == 1


class Recorder(TorchDispatchMode):
    """The calls of the attention operators, and how often each ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ringflash":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("listed", ["cu_seqlens", "query_cu_seqlens"])
def test_a_list_goes_where_the_tensor_beside_it_lies(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 9, 2, 8, device="meta")
    edges = {name: torch.tensor([0, 4, 9], device="meta") for name in ("cu_seqlens", "query_cu_seqlens")}
    with Recorder() as recorder:
        attention(x, x, x, **edges | {listed: [0, 4, 9]}, group=ONE_DEVICE)
    ((_, arguments),) = recorder.calls
    assert [bounds.device.type for bounds in arguments[4:6]] == ["meta", "meta"]


def test_selective_checkpointing_keeps_the_rows(readings: list) -> None:
    problem = tensors(CASE)
    leaves = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
    layer = lambda *x: attend(CASE, problem)(*x, None)[0].square()  # noqa: E731
    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    readings.clear()

    def save(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = operator is torch.ops.ringflash.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, save)
    with Recorder() as recorder:
        out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(out.sum(), leaves)
    operators = [operator for operator, _ in recorder.calls]
    assert operators == [torch.ops.ringflash.attention.default, torch.ops.ringflash.attention_backward.default]
    assert len(readings) == 1
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("features", [{}, EVERY_FEATURE], ids=["plain", "every feature"])
def test_it_compiles_whole(features: dict) -> None:
    problem = tensors(case := replace(CASE, **features))
    eager = solve(attend(case, problem), problem)
    torch._dynamo.reset()
    compiled = torch.compile(attend(case, problem), fullgraph=True, backend="aot_eager")
    for found, right in zip(solve(compiled, problem), eager, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("features", [{}, EVERY_FEATURE], ids=["plain", "every feature"])
def test_opcheck_of_the_operators(features: dict) -> None:
    problem = tensors(case := replace(CASE, **features))
    with Recorder() as recorder:
        solve(attend(case, problem), problem)
    (forward, inputs), (backward, gradients) = recorder.calls
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    torch.library.opcheck(forward, (*leaves, *inputs[3:]))
    torch.library.opcheck(backward, tuple(x.detach() if isinstance(x, Tensor) else x for x in gradients))


@pytest.mark.parametrize("lengths", [(1,), (1, 2, 3)])
def test_a_prefix_for_each_document_must_fit_their_number(lengths: tuple[int, ...]) -> None:
    x = torch.ones(1, 6, 2, 8)
    with pytest.raises(ArgumentError, match=f"prefix_lm has {len(lengths)} lengths for 2 documents"):
        attention(x, x, x, mask=Mask.prefix_lm(lengths), cu_seqlens=torch.tensor([0, 2, 6]), group=ONE_DEVICE)
