"""The ring's flash-attn functions: on any number of ranks what the definition says, and what they refuse."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    Case,
    Rules,
    Tensors,
    assert_as_exact_as_torch,
    assert_transformations_are_refused,
    cases,
    exact,
    tensors,
)
from cases import PARTITIONS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash
from ringflash import (
    ArgumentError,
    Mask,
    flash_attn_func,
    ring_flash_attn_func,
    ring_flash_attn_qkvpacked_func,
    ring_flash_attn_varlen_func,
    ring_flash_attn_varlen_qkvpacked_func,
    shard,
    unshard,
)

SHARED = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, group=None, partition='zigzag', "
)
SIGNATURES = {
    "ring_flash_attn_func": f"(q, k, v, {SHARED}seqlen_q=None, seqlen_k=None)",
    "ring_flash_attn_qkvpacked_func": f"(qkv, {SHARED}seqlen=None)",
    "ring_flash_attn_varlen_func": f"(q, k, v, cu_seqlens, max_seqlen, {SHARED}seqlen=None)",
    "ring_flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {SHARED}seqlen=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(ringflash, name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]
    assert name in ringflash.__all__


def words(case: Case, problem: Tensors) -> dict[str, object]:
    """A case in flash-attn's words; S_dmask and the log-sum-exp come without dropout only."""
    return {
        "dropout_p": case.dropout,
        "softmax_scale": case.scale,
        "causal": case.rules.right == 0,
        "window_size": tuple(-1 if x is None else x for x in (case.rules.left, case.rules.right)),
        "softcap": case.softcap,
        "alibi_slopes": problem.slopes,
        "return_attn_probs": not case.dropout,
    }


def batch_on_this_rank(case: Case, problem: Tensors, partition: str, packed: bool) -> tuple[Tensor, ...]:
    """Whole results of a batch from all ranks: out, lse if any, and gradients, in flat form."""
    batch, sharded = len(case.lengths), {"partition": partition, "mask": case.rules.mask()}
    whole = [x.unflatten(0, (batch, -1)) for x in (problem.query, problem.key, problem.value, problem.dout)]
    lengths = [x.shape[1] for x in whole]
    *leaves, dout = (shard(x, 1, **sharded).clone() for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    torch.manual_seed(case.seed)
    given = words(case, problem) | {"partition": partition}
    if packed:
        results = ring_flash_attn_qkvpacked_func(torch.stack(leaves, 2), **given, seqlen=lengths[0])
    else:
        results = ring_flash_attn_func(*leaves, **given, seqlen_q=lengths[0], seqlen_k=lengths[1])
    out, outputs, gradients = results, [results], [dout]
    if not case.dropout:
        out, lse, nothing = results
        assert nothing is None
        dlse = shard(problem.dlse.unflatten(1, (batch, -1)), 2, **sharded).transpose(0, 1)
        outputs, gradients = [out, lse], [dout, dlse]
    found = torch.autograd.grad(outputs, leaves, gradients)
    parts = zip((out.detach(), *found), [lengths[0], *lengths[:3]], strict=True)
    out, *found = (unshard(x.contiguous(), 1, **sharded, seqlen=n).flatten(0, 1) for x, n in parts)
    if case.dropout:
        return out, *found
    lse = unshard(lse.detach().transpose(0, 1).contiguous(), 2, **sharded, seqlen=lengths[0])
    return out, lse.flatten(1), *found


def packed_on_this_rank(case: Case, problem: Tensors, partition: str, packed: bool) -> tuple[Tensor, ...]:
    """The same of packed sequences."""
    edges = case.edges()[0]
    sharded = {"partition": partition, "mask": case.rules.mask() & Mask.documents(edges)}
    *leaves, dout = (shard(x, 0, **sharded) for x in (problem.query, problem.key, problem.value, problem.dout))
    leaves = [x.clone().requires_grad_() for x in leaves]
    longest = max(queries for queries, _ in case.lengths)
    torch.manual_seed(case.seed)
    given = words(case, problem) | {"partition": partition}
    if packed:
        qkv = torch.stack(leaves, 1)
        results = ring_flash_attn_varlen_qkvpacked_func(qkv, torch.tensor(edges, dtype=torch.int32), longest, **given)
    else:
        results = ring_flash_attn_varlen_func(*leaves, edges, longest, **given)
    out, outputs, gradients = results, [results], [dout]
    if not case.dropout:
        out, lse, nothing = results
        assert nothing is None
        outputs, gradients = [out, lse], [dout, shard(problem.dlse, 1, **sharded)]
    found = torch.autograd.grad(outputs, leaves, gradients)
    out, *found = (unshard(x.contiguous(), 0, **sharded, seqlen=edges[-1]) for x in (out.detach(), *found))
    if case.dropout:
        return out, *found
    return out, unshard(lse.detach().contiguous(), 1, **sharded, seqlen=edges[-1]), *found


def check(pool: Callable, case: Case, data: st.DataObject, function: Callable) -> None:
    ranks, partition = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(PARTITIONS))
    assume(partition != "balanced" or all(queries == keys for queries, keys in case.lengths))
    packed = case.dims[0] == case.dims[1] and case.heads[0] == case.heads[1] and case.queries == case.keys
    problem = tensors(case)
    if case.dropout:  # its log-sum-exp is not asked for
        torch.manual_seed(case.seed)
        problem = replace(problem, dropout_seed=torch.randint(2**62, (1,)), dlse=torch.zeros_like(problem.dlse))
    found, *others = pool(ranks).run(function, case, problem, partition, packed)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(found, other, strict=True))
    if case.dropout:
        found = found[0], _lse(case, problem), *found[1:]
    assert_as_exact_as_torch(tuple(found), case, problem)


def _lse(case: Case, problem: Tensors) -> Tensor:
    """The right one: in place of what was not asked for."""
    return exact(case, problem)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=20)
@given(data=st.data())
def test_batches_on_any_ranks_are_as_exact_as_torch(pool, dtype: torch.dtype, data: st.DataObject) -> None:
    check(
        pool, data.draw(cases(dtype, dense=True, same=data.draw(st.booleans()), flash=True)), data, batch_on_this_rank
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=20)
@given(data=st.data())
def test_packed_sequences_on_any_ranks_are_as_exact_as_torch(pool, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, dense=False, same=True, flash=True))
    assume(case.queries)
    check(pool, case, data, packed_on_this_rank)


def _refused(arguments: dict, message: str) -> None:
    x = torch.ones(1, 6, 2, 8)
    with pytest.raises(ArgumentError, match=message):
        ring_flash_attn_func(x, x, x, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout_p": 0.1, "return_attn_probs": True}, "return_attn_probs=True with dropout_p=0.1 over 2 ranks"),
        ({"dropout_p": 2.0}, "dropout_p=2.0"),
        ({"window_size": (-3, 0)}, "window_size"),
        ({"partition": "snake"}, "partition='snake'"),
    ],
    ids=str,
)
def test_refused_by_name_before_any_communication(pool, arguments: dict, message: str) -> None:
    pool(2).run(_refused, arguments, message, timeout=15)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_seqlen": 3}, "max_seqlen=3; the longest sequence has 4"),
        ({"seqlen": 8}, "seqlen=8; cu_seqlens ends at 6"),
        ({"cu_seqlens": [6]}, r"cu_seqlens=\[6\]"),
        ({"cu_seqlens": torch.tensor([0, 6], device="meta")}, "cu_seqlens is .* on meta"),
        ({"q": torch.ones(1, 6, 2, 8)}, r"q has shape \(1, 6, 2, 8\)"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_packed_sequences_are_refused_by_name(changed: dict, message: str) -> None:
    x = torch.ones(6, 2, 8)
    with pytest.raises(ArgumentError, match=message):
        ring_flash_attn_varlen_func(**{"q": x, "k": x, "v": x, "cu_seqlens": [0, 4, 6], "max_seqlen": 4} | changed)


def test_one_rank_shows_what_dropout_took() -> None:
    x = torch.randn(1, 6, 2, 8)
    results = []
    for function in (flash_attn_func, ring_flash_attn_func):
        torch.manual_seed(2)
        results.append(function(x, x, x, 0.5, return_attn_probs=True))
    torch.manual_seed(2)
    packed = ring_flash_attn_varlen_func(*[x[0]] * 3, [0, 6], 6, 0.5, return_attn_probs=True)
    assert (packed[2] < 0).any()
    assert torch.equal(packed[2], results[0][2])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _varlen(x: Tensor) -> Tensor:
    return ring_flash_attn_varlen_func(*[x[0]] * 3, [0, 4, 12], 8, causal=True)


def _transformed(packed: bool) -> None:
    call = _varlen if packed else lambda x: ring_flash_attn_func(x, x, x, causal=True)
    assert_transformations_are_refused(call, torch.randn(1, 6, 2, 8))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "varlen"])
def test_second_derivatives_forward_mode_and_vmap_are_refused(pool, packed: bool) -> None:
    pool(2).run(_transformed, packed, timeout=15)


def _compiled(way: str) -> None:
    torch.compiler.reset()
    lengths = ((5, 5),) * 2 if way == "batch" else ((5, 5), (0, 0), (5, 5))
    case = Case(lengths, Rules(left=6, right=0), alibi="documents")
    problem = tensors(case)
    whole, edges = (problem.query, problem.key, problem.value), case.edges()[0]
    if way == "batch":
        function = functools.partial(ring_flash_attn_func, seqlen_q=5, seqlen_k=5)
        leaves, bounds = [shard(x.unflatten(0, (2, 5)), 1).clone().requires_grad_() for x in whole], ()
    else:
        function, bounds = ring_flash_attn_varlen_func, (edges if way == "list" else torch.tensor(edges), 5)
        leaves = [shard(x, 0).clone().requires_grad_() for x in whole]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [call(*leaves, *bounds, **words(case, problem)) for call in (function, compiled)]
    gradients = [torch.autograd.grad(out.sum(), leaves) for out, _, _ in results]
    for found, expected in zip((*results[1][:2], *gradients[1]), (*results[0][:2], *gradients[0]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["batch", "list", "tensor"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiles_whole(pool, ranks: int, way: str) -> None:
    if ranks == 1:
        _compiled(way)
    else:
        pool(ranks).run(_compiled, way, timeout=120)
