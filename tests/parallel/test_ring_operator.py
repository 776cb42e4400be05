"""The operator under torch.compile, opcheck, checkpointing and autocast, and the inputs that it takes and refuses."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attention_cases import Case, Rules, solve
from cases import Shape, inputs
from ring import Layer, Problem
from sharded_cases import ShardedCase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringflash import ArgumentError, DistributedFlashAttention, Mask, Partition


def _compiled(backend, mask, partition, documents):
    length = 40
    problem = Problem(mask, Shape(length=length), partition)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = problem.rows(rank, ranks)
    *leaves, dout = (x[:, rows] for x in problem.inputs())
    module = DistributedFlashAttention(mask, partition=partition)

    def layer(q, k, v, cu_seqlens):
        return module(q * 2, k, v + 1, cu_seqlens=cu_seqlens, seqlen=length).sin()

    def gradients(function, cu_seqlens):
        inner = [x.detach().clone().requires_grad_() for x in leaves]
        out = function(*inner, cu_seqlens)
        return (out, *torch.autograd.grad(out, inner, dout))

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for cuts in documents:
        cu_seqlens = None if cuts is None else torch.tensor([0, *cuts, length])
        expected = gradients(layer, cu_seqlens)
        torch.testing.assert_close(gradients(compiled, cu_seqlens), expected, atol=1e-5, rtol=1e-5)


CXX, HEADER = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"needs {CXX}: torch.compile writes C++ for CPUs")
@pytest.mark.skipif(not HEADER.is_file(), reason=f"needs {HEADER}: torch.compile writes C++ for CPUs")
def test_it_compiles_by_inductor_without_graph_breaks():
    _compiled("inductor", Mask.causal() & Mask.sliding_window(20), "zigzag", [[13]])


@pytest.mark.parametrize(
    ("mask", "documents"),
    [
        (Mask.causal(), [None, [], [13], [7, 13], [3, 20]]),
        (Mask.prefix_lm([3, 5]) & Mask.chunked(9), [[20], [31]]),
        (Mask.sliding_window(5, sink=2), [None, [13]]),
    ],
    ids=["causal", "prefix-chunked", "window-sink"],
)
def test_it_traces_without_graph_breaks_on_one_device(mask, documents):
    _compiled("aot_eager", mask, "zigzag", documents)


OWN = Partition(40, (((0, 9), (30, 40)), ((9, 30),)))


@pytest.mark.parametrize(
    ("partition", "documents"),
    [("zigzag", [None, [13], [7, 20]]), (OWN, [None, [13]]), ("balanced", [None])],
    ids=["zigzag", "own", "balanced"],
)
def test_it_traces_without_graph_breaks_on_two_ranks(pool, partition, documents):
    pool(2).run(_compiled, "aot_eager", Mask.causal(), partition, documents, timeout=120)


FEATURES = {
    "sinks": {"sinks": True},
    "padding": {"padding": True},
    "alibi": {"alibi": "documents"},
    "everything": {"sinks": True, "padding": True, "alibi": "documents", "softcap": 2.0, "dropout": 0.4},
}


def _features(name, dense, boundaries, head_ranks=1):
    """Features of a batch of cross attention, or of packed documents, with none among them."""
    lengths = ((7, 9),) * 2 if dense else ((9, 9), (0, 0), (4, 4))
    case = Case(lengths, Rules(left=6, right=0), **FEATURES[name])
    return ShardedCase(case, dense, boundaries=boundaries, head_ranks=head_ranks)


def _compiled_features(sharded):
    share = sharded.share(dist.get_rank(), dist.get_world_size())
    expected = solve(sharded.attend(share), share)
    torch._dynamo.reset()
    compiled = torch.compile(sharded.attend(share), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(solve(compiled, share), expected, atol=1e-6, rtol=1e-6)


WAYS = [(True, "list"), (False, "list"), (False, "tensor"), (False, "mask")]
WITH_FEATURES = [("sinks", True, "list"), ("padding", True, "list"), ("alibi", False, "tensor")]


@pytest.mark.parametrize(("name", "dense", "boundaries"), [*WITH_FEATURES, *(("everything", *way) for way in WAYS)])
def test_features_trace_without_graph_breaks_on_two_ranks(pool, name, dense, boundaries):
    pool(2).run(_compiled_features, _features(name, dense, boundaries), timeout=120)


@pytest.mark.parametrize(("dense", "boundaries"), [(True, "list"), (False, "tensor")])
def test_features_trace_without_graph_breaks_where_heads_are_exchanged(pool, dense, boundaries):
    pool(4).run(_compiled_features, _features("everything", dense, boundaries, head_ranks=2), timeout=120)


class Recorder(TorchDispatchMode):
    """The calls of the attention operator."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.ringflash.attention.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def _operator_check(partition):
    problem = Problem(Mask.causal(), Shape(length=24), partition)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = problem.rows(rank, ranks)
    attend = DistributedFlashAttention(problem.mask, partition=partition)
    for cu_seqlens in (None, [0, 9, 24]):
        with Recorder() as recorder:
            attend(*(x[:, rows].requires_grad_() for x in problem.inputs()[:3]), cu_seqlens=cu_seqlens, seqlen=24)
        (call,) = recorder.calls
        tensors = [x.detach().clone().requires_grad_() for x in call[:3]]
        torch.library.opcheck(torch.ops.ringflash.attention.default, (*tensors, *call[3:]))


def test_the_operator_passes_opcheck_on_one_device():
    _operator_check("zigzag")


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
def test_the_operator_passes_opcheck_on_two_ranks(pool, partition):
    pool(2).run(_operator_check, partition, timeout=120)


def _operator_check_of_features(sharded):
    share = sharded.share(dist.get_rank(), dist.get_world_size())
    with Recorder() as recorder:
        leaves = [x.requires_grad_() for x in (share.query, share.key, share.value)]
        sharded.attend(share)(*leaves, None if share.sinks is None else share.sinks.requires_grad_())
    (call,) = recorder.calls
    tensors = [x.detach().clone().requires_grad_() for x in call[:3]]
    torch.library.opcheck(torch.ops.ringflash.attention.default, (*tensors, *call[3:]))


@pytest.mark.parametrize(
    ("name", "dense", "boundaries"), [*WITH_FEATURES, ("everything", True, "list"), ("everything", False, "tensor")]
)
def test_the_operator_passes_opcheck_with_features_on_two_ranks(pool, name, dense, boundaries):
    pool(2).run(_operator_check_of_features, _features(name, dense, boundaries), timeout=120)


@pytest.mark.parametrize(("ranks", "dense"), [(2, True), (4, False)])
def test_the_operator_passes_opcheck_where_heads_are_exchanged(pool, ranks, dense):
    sharded = _features("everything", dense, "list" if dense else "tensor", head_ranks=2)
    pool(ranks).run(_operator_check_of_features, sharded, timeout=120)


def _save_attention(context, operator, *args, **kwargs):
    save = operator is torch.ops.ringflash.attention.default
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed():
    layer = Layer(None)
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
    contexts = functools.partial(create_selective_checkpoint_contexts, _save_attention)
    runs = []
    for wrap in (lambda: layer(x, 24), lambda: checkpoint(layer, x, 24, use_reentrant=False, context_fn=contexts)):
        layer.zero_grad()
        with Recorder() as recorder:
            wrap().square().sum().backward()
        runs.append((len(recorder.calls), [p.grad.clone() for p in layer.parameters()]))
    return runs


def test_selective_checkpointing_runs_attention_and_its_communication_once(pool):
    for (plain_calls, plain), (calls, gradients) in pool(2).run(_checkpointed):
        assert plain_calls == calls == 1
        assert all(torch.equal(*pair) for pair in zip(plain, gradients, strict=True))


# Inputs


def _strided_inputs():
    rank = dist.get_rank()
    q, k, v, _ = (x.chunk(2, dim=1)[rank] for x in inputs(Shape(length=20)))
    attend = DistributedFlashAttention(Mask.causal(), partition="contiguous")
    expected = attend(q, k, v)
    packed = torch.cat([q, k, v], dim=2)
    assert torch.equal(attend(*packed.split([4, 2, 2], dim=2)), expected)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attend(*heads_first), expected)
    interleaved = torch.stack([q, q], dim=-1)[..., 0]
    with pytest.raises(ArgumentError, match=r"query has strides.*contiguous"):
        attend(interleaved, k, v)
    leaf = q.clone().requires_grad_()
    attend(leaf, k, v).sum().backward()  # the gradient of a sum has strides of 0
    again = q.clone().requires_grad_()
    attend(again, k, v).backward(torch.ones_like(expected))
    torch.testing.assert_close(leaf.grad, again.grad)


def test_inputs_and_gradients_may_have_any_strides(pool):
    pool(2).run(_strided_inputs)


def _inference():
    q, k, v, _ = (x.chunk(2, dim=1)[dist.get_rank()] for x in inputs(Shape(length=20)))
    attend = DistributedFlashAttention(Mask.causal(), partition="contiguous")
    expected = attend(q, k, v)
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k, v).dtype == torch.bfloat16
    k = k.clone().requires_grad_()
    attend(q, k, v).sum().backward()
    assert k.grad.isfinite().all()


def test_inference_mode_autocast_and_partly_required_gradients(pool):
    pool(2).run(_inference)


BAD_CALLS = {
    "query has shape": lambda q, k, v: dict(query=q[0], key=k, value=v),
    "key is torch.float16": lambda q, k, v: dict(query=q, key=k.half(), value=v),
    "query is torch.int64|query is torch.int32|torch.int": lambda q, k, v: dict(
        query=q.int(), key=k.int(), value=v.int()
    ),
    "query has 3 heads, key 2": lambda q, k, v: dict(query=q[:, :, :3], key=k, value=v),
    "do not go together": lambda q, k, v: dict(query=q, key=k[:, :5], value=v),
    "cu_seqlens.*14": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=[0, 14]),
    "cu_seqlens.*5, 3": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=[0, 5, 3, 12]),
    "cu_seqlens.*13": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=torch.tensor([0, 13])),
    "cu_seqlens.*7, 2": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=torch.tensor([0, 7, 2, 12])),
    "seqlen.*13|13.*seqlen|12 tokens.*13": lambda q, k, v: dict(query=q, key=k, value=v, seqlen=13),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_refused_by_name_and_value_on_one_device(message):
    arguments = BAD_CALLS[message](*inputs(Shape(length=12))[:3])
    with pytest.raises(ArgumentError, match=message):
        DistributedFlashAttention(Mask.causal())(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partition": "stripes"}, "stripes.*zigzag"),
        ({"group": 3}, "group=3"),
        ({"kernel": "fastest"}, "fastest.*blockwise"),
    ],
)
def test_bad_module_arguments_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        DistributedFlashAttention(**arguments)(*inputs(Shape(length=4))[:3])


def test_prefixes_must_be_one_for_each_document():
    attend = DistributedFlashAttention(Mask.prefix_lm([3, 2, 1]))
    with pytest.raises(ArgumentError, match=r"3 lengths for 2 documents"):
        attend(*inputs(Shape(length=12))[:3], cu_seqlens=[0, 5, 12])
