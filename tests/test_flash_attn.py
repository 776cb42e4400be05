"""flash-attn's functions: their signatures, their rules against float64, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from attention_cases import (
    HEAD_DIMS,
    Case,
    Rules,
    Tensors,
    assert_as_exact_as_torch,
    assert_transformations_are_refused,
    by_definition,
    cases,
    kept,
    solve,
    tensors,
    wide_heads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import ringflash
from ringflash import (
    ArgumentError,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARED = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": "q, k, v",
    "flash_attn_kvpacked_func": "q, kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen",
}
"""The arguments of flash-attn 2.8 without defaults; those of SHARED follow."""


def named(x: object) -> str:
    return str(x).removeprefix("torch.")


@pytest.mark.parametrize(("name", "own"), SIGNATURES.items(), ids=list(SIGNATURES))
def test_signatures_are_those_of_flash_attn(name: str, own: str) -> None:
    signature = inspect.signature(getattr(ringflash, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    block_table = ", block_table=None" if name == "flash_attn_varlen_func" else ""
    assert str(inspect.Signature(bare)) == f"({own}, {SHARED}{block_table})"
    assert name in ringflash.__all__


# Against float64


def options(case: Case, problem: Tensors) -> dict[str, object]:
    """A case in flash-attn's words."""
    causal = case.rules.right == 0
    window = tuple(-1 if x is None else x for x in (case.rules.left, case.rules.right))
    return {
        "dropout_p": case.dropout,
        "softmax_scale": case.scale,
        "causal": causal,
        "window_size": (window[0], 5) if causal else window,  # causal takes precedence over the window's right side
        "softcap": case.softcap,
        "alibi_slopes": problem.slopes,
        "return_attn_probs": True,
    }


def dense(case: Case, problem: Tensors, packing: str = "") -> Callable[..., tuple[Tensor, Tensor]]:
    """One of the functions for batches, of flat tensors."""

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: None) -> tuple[Tensor, Tensor]:
        batch = len(case.lengths)
        q, k, v = (x.unflatten(0, (batch, x.shape[0] // batch)) for x in (query, key, value))
        torch.manual_seed(case.seed)
        if packing == "kv":
            results = flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options(case, problem))
        elif packing == "qkv":
            results = flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options(case, problem))
        else:
            results = flash_attn_func(q, k, v, **options(case, problem))
        out, lse, probabilities = results
        assert lse.shape == (batch, case.heads[0], case.lengths[0][0])
        _check_probabilities(probabilities, case, problem, query, key, value)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    return call


def varlen(
    case: Case, problem: Tensors, packing: str = "", longer: int = 0, rest: int = 0
) -> Callable[..., tuple[Tensor, Tensor]]:
    """One of the functions for packed sequences; max_seqlen may be longer than needed, buffers may have a rest."""

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: None) -> tuple[Tensor, Tensor]:
        q, k, v = (torch.cat([x, torch.full((rest, *x.shape[1:]), 7.0, dtype=x.dtype)]) for x in (query, key, value))
        edges = [torch.tensor(x, dtype=torch.int32) for x in case.edges()]
        longest = [max(x) + longer for x in zip(*case.lengths, strict=True)]
        torch.manual_seed(case.seed)
        if packing == "kv":
            kv = torch.stack([k, v], 1)
            results = flash_attn_varlen_kvpacked_func(q, kv, *edges, *longest, **options(case, problem))
        elif packing == "qkv":
            qkv = torch.stack([q, k, v], 1)
            results = flash_attn_varlen_qkvpacked_func(qkv, edges[0], longest[0], **options(case, problem))
        else:
            results = flash_attn_varlen_func(q, k, v, *edges, *longest, **options(case, problem))
        out, lse, probabilities = results
        assert lse.shape == (case.heads[0], case.queries + rest)
        assert not out[case.queries :].any()
        assert lse[:, case.queries :].isneginf().all()
        _check_probabilities(probabilities, case, problem, query, key, value)
        return out[: case.queries], lse[:, : case.queries]

    return call


def _check_probabilities(found: Tensor | None, case: Case, problem: Tensors, *qkv: Tensor) -> None:
    """S_dmask is the softmax, negative where dropout took a pair: out follows from it."""
    if not case.dropout:
        assert found is None
        return
    query_edges, key_edges = case.edges()
    keys = torch.eye(case.keys, dtype=torch.float64)[:, None, :].expand(-1, case.heads[1], -1)
    wide = [x.detach().double() for x in qkv[:2]]
    with torch.no_grad():  # values that are the unit vectors make the weights the output
        weights = by_definition(replace(case, dropout=0.0), problem, *wide, keys, None)[0].transpose(0, 1)
    signed = torch.where(kept(case, problem), weights, -weights)
    assert found.dtype == qkv[0].dtype
    shape = [len(case.lengths), case.heads[0], *(max(x) for x in zip(*case.lengths, strict=True))]
    assert all(a >= b for a, b in zip(found.shape, shape, strict=True))
    for n, (queries, keys_here) in enumerate(case.lengths):
        block = signed[:, query_edges[n] :, key_edges[n] :][:, :queries, :keys_here]
        torch.testing.assert_close(found[n, :, :queries, :keys_here].double(), block, atol=1e-2, rtol=1e-2)
        assert not found[n, :, queries:].any()
        assert not found[n, :, :, keys_here:].any()


def check(case: Case, data: st.DataObject, same: bool, call: Callable, **settings: int) -> None:
    packings = ["", "kv"] if case.dims[0] == case.dims[1] else [""]
    packings += ["qkv"] if packings[1:] and same and case.heads[0] == case.heads[1] else []
    problem = tensors(case)
    if case.dropout:
        torch.manual_seed(case.seed)
        problem = replace(problem, dropout_seed=torch.randint(2**62, (1,)))
    attend = call(case, problem, data.draw(st.sampled_from(packings)), **settings)
    assert_as_exact_as_torch(solve(attend, problem), case, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=30)
@given(st.data())
def test_batches_are_as_exact_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    same = data.draw(st.booleans())
    check(data.draw(cases(dtype, dense=True, same=same, flash=True)), data, same, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=30)
@given(st.data())
def test_packed_sequences_are_as_exact_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    same = data.draw(st.booleans())
    case = data.draw(cases(dtype, dense=False, same=same, flash=True))
    longer, rest = (data.draw(st.sampled_from([0, 0, 5])) for _ in range(2))
    check(case, data, same, varlen, longer=longer, rest=rest)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@settings(max_examples=8)
@given(st.data())
def test_any_head_dimension_and_any_of_the_values_is_as_exact_as_torch(dim: int, data: st.DataObject) -> None:
    same, call = data.draw(st.booleans()), data.draw(st.sampled_from([dense, varlen]))
    case = data.draw(cases(data.draw(st.sampled_from(DTYPES)), dense=call is dense, same=same, flash=True))
    check(data.draw(wide_heads(case, [dim])), data, same, call)


def test_causal_is_aligned_at_the_end() -> None:
    """The pictures of flash-attn's documentation: 2 queries to 5 keys, and 5 queries to 2 keys."""
    pictures = {(2, 5): ["11110", "11111"], (5, 2): ["00", "00", "00", "10", "11"]}
    for (queries, keys), rows in pictures.items():
        q, k, v = torch.zeros(1, queries, 1, 8), torch.zeros(1, keys, 1, 8), torch.eye(keys, 8).reshape(1, keys, 1, 8)
        out = flash_attn_func(q, k, v, causal=True)[0, :, 0, :keys]
        assert ["".join("1" if x else "0" for x in row) for row in out] == rows


def test_window_of_flash_attn_is_inclusive_and_minus_one_is_no_bound() -> None:
    x, v = torch.zeros(1, 6, 1, 8), torch.eye(6, 8).reshape(1, 6, 1, 8)
    keys_seen = {
        (-1, -1): [6, 6, 6, 6, 6, 6],
        (0, 0): [1, 1, 1, 1, 1, 1],
        (1, 2): [3, 4, 4, 4, 3, 2],
        (-1, 0): [1, 2, 3, 4, 5, 6],
        (0, -1): [6, 5, 4, 3, 2, 1],
    }
    for window, expected in keys_seen.items():
        out = flash_attn_func(x, x, v, window_size=window)[0, :, 0]
        assert (out > 0).sum(-1).tolist() == expected


def test_a_last_dimension_that_is_not_contiguous_is_copied() -> None:
    q, k, v = (torch.randn(2, 5, 8, 4) for _ in range(3))
    expected = flash_attn_func(*(x.mT.contiguous() for x in (q, k, v)))
    assert torch.equal(flash_attn_func(*(x.mT for x in (q, k, v))), expected)


def test_a_negative_softcap_is_none() -> None:
    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(flash_attn_func(x, x, x, softcap=-1.0), flash_attn_func(x, x, x))


@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients_repeat_bit_for_bit_on_the_cpu(deterministic: bool) -> None:
    x = torch.randn(2, 50, 4, 16, requires_grad=True)
    runs = [torch.autograd.grad(flash_attn_func(x, x, x, deterministic=deterministic).sum(), x) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


# Pages


@settings(max_examples=30)
@given(st.data())
def test_pages_give_what_contiguous_keys_give(data: st.DataObject) -> None:
    case = data.draw(cases(torch.float32, dense=False, flash=True))
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    problem, random = tensors(case), torch.Generator().manual_seed(case.seed)
    needed = [-(-keys // page_size) for _, keys in case.lengths]
    order = torch.randperm(sum(needed) + 2, generator=random)
    table = torch.full((len(needed), max(needed) + 1), -1, dtype=torch.int32)
    for n, pages in enumerate(order[: sum(needed)].split(needed)):
        table[n, : needed[n]] = pages.int()
    edges = [torch.tensor(x, dtype=torch.int32) for x in case.edges()]
    rows = torch.tensor(  # where each key lies
        [
            int(table[n, i // page_size]) * page_size + i % page_size
            for n, (_, m) in enumerate(case.lengths)
            for i in range(m)
        ]
    ).long()
    paged = [torch.full((len(order) * page_size, *x.shape[1:]), torch.nan) for x in (problem.key, problem.value)]
    for pages, x in zip(paged, (problem.key, problem.value), strict=True):
        pages[rows] = x
    longest = [max(x) + 3 for x in zip(*case.lengths, strict=True)]
    leaves = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
    torch.manual_seed(0)
    expected = flash_attn_varlen_func(*leaves, *edges, *longest, **options(case, problem))
    torch.manual_seed(0)
    paged = [pages.unflatten(0, (-1, page_size)).requires_grad_() for pages in paged]
    found = flash_attn_varlen_func(leaves[0], *paged, *edges, *longest, **options(case, problem), block_table=table)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    of_keys = torch.autograd.grad((expected[0] * problem.dout).sum(), leaves)
    of_pages = torch.autograd.grad((found[0] * problem.dout).sum(), (leaves[0], *paged))
    torch.testing.assert_close(of_pages[0], of_keys[0], rtol=1e-5, atol=1e-5)
    for x, y in zip(of_pages[1:], of_keys[1:], strict=True):
        torch.testing.assert_close(x.flatten(0, 1)[rows], y, rtol=1e-5, atol=1e-5)
        assert x.count_nonzero() == y.count_nonzero()  # nothing elsewhere


# torch's machinery


FEATURES = {"softcap": 3.0, "alibi": "documents", "dropout": 0.3}


@pytest.mark.parametrize(
    ("packing", "features"),
    [("", {}), ("", FEATURES), ("kv", {}), ("qkv", {})],
    ids=["q-k-v", "every feature", "q-kv", "qkv"],
)
@pytest.mark.parametrize("call", [dense, varlen], ids=["batch", "varlen"])
def test_compiles_whole(call: Callable, packing: str, features: dict) -> None:
    torch.compiler.reset()
    lengths = ((9, 9),) * 2 if call is dense else ((9, 9), (0, 0), (4, 4))
    case = Case(lengths, Rules(left=6, right=0), heads=(2, 2), **features)
    problem = tensors(case)
    edges = torch.tensor(case.edges()[0], dtype=torch.int32)
    qkv = torch.stack([problem.query, problem.key, problem.value], 1)
    words = options(case, problem)

    def run(qkv: Tensor, edges: Tensor) -> tuple[Tensor, ...]:
        x = qkv if call is varlen else qkv.unflatten(0, (2, -1))
        q, k, v = x.unbind(-3)
        kv = x[..., 1:, :, :]
        arguments = {"": (q, k, v), "kv": (q, kv), "qkv": (x,)}[packing]
        functions = {
            "": (flash_attn_func, flash_attn_varlen_func),
            "kv": (flash_attn_kvpacked_func, flash_attn_varlen_kvpacked_func),
            "qkv": (flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func),
        }
        both = 1 if packing == "qkv" else 2
        bounds = () if call is dense else (*[edges] * both, *[9] * both)
        one_length, any_lengths = functions[packing]
        return (any_lengths if call is varlen else one_length)(*arguments, *bounds, **words)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        torch.manual_seed(3)
        leaf = qkv.clone().requires_grad_()
        out, lse, probabilities = function(leaf, edges)
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaf), *([probabilities] if features else [])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_one_device_functions_never_communicate() -> None:
    """In a group of four whose other ranks do not exist, the whole sequence is still attended."""
    x, edges = torch.randn(1, 7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)

    def results() -> list[Tensor]:
        return [flash_attn_func(x, x, x, causal=True), flash_attn_varlen_func(*[x[0]] * 3, edges, edges, 4, 4)]

    alone = results()
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        among_four = results()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(alone, among_four, strict=True))


def test_autocast_is_respected() -> None:
    x = torch.randn(1, 9, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn_func(x, x, x).dtype == torch.bfloat16


def packed(x: Tensor) -> Tensor:
    """`flash_attn_varlen_func` of the tokens (5, nheads, headdim) to themselves."""
    return flash_attn_varlen_func(x, x, x, EDGES, EDGES, 3, 3, causal=True)


@pytest.mark.parametrize(
    ("call", "x"),
    [(flash_attn_qkvpacked_func, torch.ones(2, 5, 3, 4, 8)), (packed, torch.ones(5, 4, 8))],
    ids=["batch", "varlen"],
)
def test_second_derivatives_forward_mode_and_vmap_are_refused(call: Callable, x: Tensor) -> None:
    assert_transformations_are_refused(call, x)


# Refusals

X = torch.ones(2, 5, 4, 8)
EDGES = torch.tensor([0, 3, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropout_p": 1.0}, "dropout_p=1.0; allowed is 0 <= dropout_p < 1"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1"),
        ({"softmax_scale": 0.0}, "softmax_scale=0.0"),
        ({"window_size": (-2, 0)}, r"window_size=\(-2, 0\)"),
        ({"window_size": (3,)}, r"window_size=\(3,\)"),
        ({"window_size": (2.9, 0)}, r"window_size=\(2\.9, 0\); allowed are integers"),
        ({"window_size": 5}, r"window_size=5; allowed is \(left, right\)"),
        ({"softcap": float("nan")}, r"softcap=nan"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes"),
        ({"alibi_slopes": torch.ones(3, 4)}, r"alibi_slopes .*\(3, 4\)"),
        ({"q": X[0]}, r"q has shape \(5, 4, 8\); allowed is \(batch, seqlen, nheads, headdim\)"),
        ({"k": torch.ones(2, 5, 3, 8), "v": torch.ones(2, 5, 3, 8)}, "query has 4 heads, key 3"),
        ({"v": X.half()}, "value is torch.float16"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_flash_attn_func_refuses_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        flash_attn_func(**{"q": X, "k": X, "v": X} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cu_seqlens_q": [0, 3, 5]}, r"cu_seqlens_q=\[0, 3, 5\]; allowed is a one-dimensional int32 tensor"),
        ({"cu_seqlens_k": EDGES.float()}, "cu_seqlens_k"),
        ({"cu_seqlens_k": EDGES[:2]}, r"cu_seqlens_q is \(3,\).*cu_seqlens_k \(2,\)"),
        ({"cu_seqlens_q": EDGES[:1]}, "cu_seqlens_q has 1 entries"),
        ({"cu_seqlens_k": EDGES * 2}, "cu_seqlens_k ends at 10, behind the last of 5 tokens"),
        ({"cu_seqlens_k": EDGES.to("meta")}, "cu_seqlens_k is on meta, q on cpu"),
        ({"cu_seqlens_k": EDGES.flip(0)}, r"cu_seqlens_k=\[5, 3, 0\]; it must start at 0 and never decrease"),
        ({"cu_seqlens_q": EDGES + 1}, r"cu_seqlens_q=\[1, 4, 6\]; it must start at 0"),
        ({"max_seqlen_q": 2}, "max_seqlen_q=2; the longest sequence has 3"),
        ({"max_seqlen_k": -1}, "max_seqlen_k=-1"),
        ({"q": X}, r"q has shape \(2, 5, 4, 8\); allowed is \(total, nheads, headdim\)"),
        ({"alibi_slopes": torch.ones(1, 4)}, r"alibi_slopes has shape \(1, 4\) for 2 sequences"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, r"k has shape \(5, 4, 8\); with block_table"),
        ({"k": X, "v": X, "block_table": torch.zeros(3, 1, dtype=torch.int32)}, r"block_table is torch.int32 \(3, 1\)"),
        (
            {"k": X[:, :2], "v": X[:, :2], "block_table": torch.zeros(2, 1, dtype=torch.int32)},
            r"a sequence of 3 keys; block_table \(2, 1\) with pages of 2 rows holds 2 of each",
        ),
        ({"k": X, "v": X, "block_table": torch.tensor([[0], [-1]])}, "block_table names pages that are not there"),
        ({"k": X, "v": X, "block_table": torch.tensor([[2], [0]])}, "allowed is 0 to 1"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_flash_attn_varlen_func_refuses_by_name(changed: dict, message: str) -> None:
    good = {"q": X[0], "k": X[0], "v": X[0], "cu_seqlens_q": EDGES, "cu_seqlens_k": EDGES}
    with pytest.raises(ArgumentError, match=message):
        flash_attn_varlen_func(**good | {"max_seqlen_q": 3, "max_seqlen_k": 3} | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attn_qkvpacked_func(X), r"qkv has shape .* allowed is \(batch, seqlen, 3, nheads, headdim\)"),
        (lambda: flash_attn_kvpacked_func(X, X[:, :, None]), r"kv has shape .* allowed is \(batch, seqlen, 2, "),
        (lambda: flash_attn_varlen_qkvpacked_func(X, EDGES, 3), r"qkv has shape .* allowed is \(total, 3, "),
        (lambda: flash_attn_varlen_kvpacked_func(X[0], X, EDGES, EDGES, 3, 3), r"kv has shape .* \(total, 2, "),
    ],
    ids=["qkv", "kv", "varlen-qkv", "varlen-kv"],
)
def test_packed_tensors_are_refused_by_name(call: Callable, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


# On GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "every feature"])
def test_packed_sequences_on_gpus_without_a_wait(dtype: torch.dtype, features: dict) -> None:
    """Boundaries stay on the device: no step of forward or backward waits for it, and a graph can capture them."""
    case = Case(((130, 257), (0, 9), (77, 77)), Rules(left=100, right=0), dims=(64, 64), dtype=dtype, **features)
    problem = tensors(case)
    edges = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in case.edges()]
    leaves = [x.cuda().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    gradients = problem.dout.cuda(), problem.dlse.cuda()
    words = options(case, replace(problem, slopes=None if problem.slopes is None else problem.slopes.cuda()))

    def run() -> list[Tensor]:
        out, lse, _ = flash_attn_varlen_func(*leaves, *edges, 130, 257, **words)
        return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, gradients)]

    run()
    torch.cuda.synchronize()
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if case.dropout:
        torch.manual_seed(0)
        problem = replace(problem, dropout_seed=torch.randint(2**62, (1,), device="cuda").cpu())
    assert_as_exact_as_torch(tuple(x.cpu() for x in found), case, problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    if not case.dropout:
        assert_as_exact_as_torch(tuple(x.cpu() for x in captured), case, problem)


@pytest.mark.gpu
def test_deterministic_gradients_repeat_bit_for_bit_on_gpus() -> None:
    x = torch.randn(2, 1500, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first = torch.autograd.grad(flash_attn_func(x, x, x, causal=True, deterministic=True).sum(), x)[0]
    for _ in range(100):
        assert torch.equal(
            torch.autograd.grad(flash_attn_func(x, x, x, causal=True, deterministic=True).sum(), x)[0], first
        )
