"""Attention over 1 to 8 ranks is attention on one device: any mask, partition, dtype and length, with gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from cases import (
    MASKS,
    PARTITIONS,
    RESULTS,
    Shape,
    any_mask,
    assert_as_exact_as_torch,
    errors,
    exact,
    inputs,
    log_sum_exp,
    masks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ring import Problem, assert_ring_is_exact, attend_share, joined, one_device, solve
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringflash import ArgumentError, DistributedFlashAttention, Mask, Partition

LENGTH = 61
"""Prime, so that it divides by nothing."""


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_mask_under_every_partition_equals_one_device(pool, ranks, name, partition):
    assert_ring_is_exact(pool, ranks, Problem(masks(LENGTH)[name], Shape(length=LENGTH), partition))


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", ["causal", "bidirectional", "documents-window-sink", "window-both-sides", "prefix"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_bfloat16_is_as_exact_as_torchs_own_attention(pool, ranks, name, partition):
    shape = Shape(length=LENGTH, heads=6, key_heads=2, head_dim=32)
    assert_ring_is_exact(pool, ranks, Problem(masks(LENGTH)[name], shape, partition, torch.bfloat16))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(pool, ranks, dtype):
    problem = Problem(masks(LENGTH)["documents-causal"], Shape(length=LENGTH), dtype=dtype)
    assert_ring_is_exact(pool, ranks, problem)
    if dtype == torch.float64:
        found = errors(solve(pool, ranks, problem), exact(problem.inputs(), problem.seen))
        assert max(found.values()) < 1e-5


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.bidirectional(), Mask.sliding_window(2, sink=1)], ids=str)
@pytest.mark.parametrize(("length", "ranks"), [(7, 4), (1, 3), (2, 4), (3, 2), (5, 3), (8, 4), (9, 4)])
def test_lengths_that_do_not_divide_and_ranks_without_tokens(pool, length, ranks, mask, partition):
    assert_ring_is_exact(pool, ranks, Problem(mask, Shape(length=length), partition))


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["causal", "bidirectional", "window-sink", "prefix", "chunked"])
def test_sequences_of_a_batch_do_not_see_each_other(pool, ranks, name, partition):
    assert_ring_is_exact(pool, ranks, Problem(masks(17)[name], Shape(batch=3, length=17), partition))


@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cu_seqlens", [(0, 5, 17, 30, 51), (0, 5, 30, 51), (0, 51), (0, 0, 51, 51)], ids=str)
def test_documents_of_a_batch_end_at_each_sequence(pool, cu_seqlens, partition):
    problem = Problem(Mask.causal(), Shape(batch=3, length=17), partition, cu_seqlens=cu_seqlens)
    assert_ring_is_exact(pool, 3, problem)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("rule", [Mask.causal(), Mask.bidirectional(), Mask.causal() & Mask.chunked(4)], ids=str)
def test_documents_may_come_with_each_call_or_with_the_mask(pool, rule, partition):
    cuts = (0, 1, 1, 20, 22, 50, LENGTH)
    with_call = Problem(rule, Shape(length=LENGTH), partition, cu_seqlens=cuts)
    with_mask = Problem(rule & Mask.documents(cuts), Shape(length=LENGTH), partition)
    assert_ring_is_exact(pool, 3, with_call)
    results, expected = solve(pool, 3, with_call), solve(pool, 3, with_mask)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("head_dim", [16, 40, 128])
def test_grouped_query_heads_and_head_dimensions(pool, heads, key_heads, head_dim):
    shape = Shape(length=30, heads=heads, key_heads=key_heads, head_dim=head_dim)
    assert_ring_is_exact(pool, 2, Problem(Mask.causal(), shape))


def test_scale_is_honoured(pool):
    assert_ring_is_exact(pool, 2, Problem(Mask.causal(), scale=0.7))


def test_the_reference_kernel_walks_the_same_plan(pool):
    assert_ring_is_exact(pool, 3, Problem(masks(LENGTH)["documents-window-sink"], kernel="reference"))


def test_a_partition_of_ones_own_is_honoured(pool):
    mine = Partition(LENGTH, (((0, 3), (10, 50)), (), ((3, 10), (50, LENGTH))))
    for name in ("causal", "bidirectional", "documents-window-sink"):
        assert_ring_is_exact(pool, 3, Problem(masks(LENGTH)[name], partition=mine))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), length=st.integers(1, 80), ranks=st.integers(2, 4), seed=st.integers(0, 99))
def test_any_composition_of_masks(pool, data, length, ranks, seed):
    mask = data.draw(any_mask(length))
    problem = Problem(mask, Shape(length=length), data.draw(st.sampled_from(PARTITIONS)), seed=seed)
    assert_ring_is_exact(pool, ranks, problem)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "documents-window-sink"])
def test_log_sum_exp_is_that_of_all_keys(pool, name):
    problem = Problem(masks(LENGTH)[name], Shape(length=LENGTH))
    query, key, *_ = problem.inputs()
    expected = log_sum_exp(query, key, problem.seen).transpose(1, 2)
    for ranks in (1, 3):
        torch.testing.assert_close(solve(pool, ranks, problem)["lse"].double(), expected, atol=1e-5, rtol=1e-5)


def _gradients_of_out_and_lse(problem, use_out):
    rows = problem.rows(dist.get_rank(), dist.get_world_size())
    query, key, value, dout = (x[:, rows] for x in problem.inputs())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = DistributedFlashAttention(problem.mask).forward_with_lse(*leaves, seqlen=problem.shape.length)
    loss = lse.square().sum() + (out * dout).sum() * use_out
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.parametrize("use_out", [0, 1])
def test_gradients_through_the_log_sum_exp(pool, use_out):
    problem = Problem(masks(LENGTH)["window-sink"], Shape(length=LENGTH))
    found = joined(problem, pool(3).run(_gradients_of_out_and_lse, problem, use_out))
    leaves = [x.double().requires_grad_() for x in problem.inputs()[:3]]
    scores = log_sum_exp(*leaves[:2], problem.seen)
    expected = torch.autograd.grad(scores.square().sum(), leaves[:2])
    with_out = exact(problem.inputs(), problem.seen)
    for name, extra in zip(("dq", "dk", "dv"), (*expected, 0), strict=True):
        torch.testing.assert_close(found[name].double(), extra + use_out * with_out[name], atol=1e-4, rtol=1e-4)


# Error against the number of ranks


def _rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_error_does_not_grow_with_the_number_of_ranks(pool, name, partition, capsys):
    shape = Shape(length=512, heads=4, key_heads=2, head_dim=64)
    problem = Problem(masks(512)[name], shape, partition, torch.bfloat16)
    oracle = exact(problem.inputs(), problem.seen)
    results = {1: one_device(problem), **{ranks: solve(pool, ranks, problem) for ranks in (2, 4, 8)}}
    table = {ranks: {x: _rms(found[x].double() - oracle[x]) for x in RESULTS} for ranks, found in results.items()}
    with capsys.disabled():
        print(f"\nbf16, {name}, {partition}: root mean square error against float64, by ranks")
        for ranks, row in table.items():
            print(
                f"{ranks:>3} ", "  ".join(f"{x} {value:.3e} ({value / table[1][x]:.3f}x)" for x, value in row.items())
            )
    for ranks, row in table.items():
        for x in RESULTS:
            assert row[x] <= 1.1 * table[1][x], (ranks, x)
    largest = {ranks: errors(found, oracle) for ranks, found in results.items()}
    for ranks, row in largest.items():
        for x in RESULTS:
            assert row[x] <= 1.1 * largest[1][x], (ranks, x)


@pytest.mark.parametrize("deterministic", [False, True])
def test_results_repeat_bit_for_bit_when_asked(pool, deterministic):
    problem = Problem(masks(LENGTH)["documents-causal"], dtype=torch.bfloat16, deterministic=deterministic)
    first, second = solve(pool, 4, problem), solve(pool, 4, problem)
    if deterministic:
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert_as_exact_as_torch(second, problem.inputs(), problem.seen)


# Groups


def test_without_a_process_group_it_is_one_device():
    for name, mask in masks(LENGTH).items():
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(mask, dtype=dtype)
            try:
                assert_as_exact_as_torch(one_device(problem), problem.inputs(), problem.seen)
            except AssertionError as error:
                error.add_note(name)
                raise


def test_one_device_takes_documents_as_a_tensor_and_batches():
    shape = Shape(batch=2, length=20)
    tensors = inputs(shape)
    problem = Problem(Mask.causal(), shape, cu_seqlens=(0, 7, 33, 40))
    attend = DistributedFlashAttention(Mask.causal())
    expected = exact(tensors, problem.seen)["out"]
    for boundaries in ([0, 7, 33, 40], torch.tensor([0, 7, 33, 40]), torch.tensor([0, 7, 33, 40], dtype=torch.int32)):
        torch.testing.assert_close(attend(*tensors[:3], cu_seqlens=boundaries).double(), expected, atol=1e-5, rtol=1e-5)


def _attend_in_sub_groups(problems):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    return attend_share(problems[mine], groups[mine])


def test_sub_groups_attend_independently_and_at_different_lengths(pool):
    problems = [Problem(Mask.causal(), Shape(length=33), seed=1), Problem(Mask.causal(), Shape(length=50), seed=2)]
    shares = pool(4).run(_attend_in_sub_groups, problems)
    for mine, problem in enumerate(problems):
        assert_as_exact_as_torch(joined(problem, shares[mine::2]), problem.inputs(), problem.seen)


def _attend_over_mesh(problems):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    return attend_share(problems[mesh.get_local_rank("data")], mesh["sequence"])


def test_a_dimension_of_a_device_mesh_is_a_group(pool):
    problems = [Problem(Mask.causal(), Shape(length=33), seed=seed) for seed in (1, 2)]
    shares = pool(4).run(_attend_over_mesh, problems)
    for data, problem in enumerate(problems):
        mine = shares[2 * data : 2 * data + 2]
        assert_as_exact_as_torch(joined(problem, mine), problem.inputs(), problem.seen)


def _attend_over_whole_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    with pytest.raises(ArgumentError, match=r"data.*sequence"):
        DistributedFlashAttention(group=mesh)(*inputs(Shape(length=4))[:3])
    outsider = dist.new_group([0, 1])
    if dist.get_rank() >= 2:
        with pytest.raises(ArgumentError, match="group"):
            DistributedFlashAttention(group=outsider)(*inputs(Shape(length=4))[:3])


def test_groups_that_name_no_sequence_ranks_are_refused(pool):
    pool(4).run(_attend_over_whole_mesh)


class Layer(torch.nn.Module):
    """Projections around the attention, so that weights have gradients."""

    def __init__(self, group, heads=4, key_heads=2, head_dim=16):
        super().__init__()
        self.sizes = (heads, key_heads, key_heads)
        generator = torch.Generator().manual_seed(5)
        self.project = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(32, n * head_dim, generator=generator) * 32**-0.5) for n in self.sizes
        )
        self.attend = DistributedFlashAttention(Mask.causal(), group)

    def forward(self, x, seqlen):
        q, k, v = ((x @ w).unflatten(-1, (n, -1)) for w, n in zip(self.project, self.sizes, strict=True))
        return self.attend(q, k, v, seqlen=seqlen)


def _batch():
    generator = torch.Generator().manual_seed(6)
    return torch.randn(2, 27, 32, generator=generator), torch.randn(2, 27, 4, 16, generator=generator)


def _ddp_step():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model = torch.nn.parallel.DistributedDataParallel(Layer(mesh["sequence"]))
    x, weights = (t[mesh.get_local_rank("data")][None] for t in _batch())
    rows = Problem(Mask.causal(), Shape(length=27)).rows(mesh.get_local_rank("sequence"), 2)
    loss = (model(x[:, rows], seqlen=27) * weights[:, rows]).sum() * dist.get_world_size()  # DDP takes the mean
    loss.backward()
    return [p.grad for p in model.parameters()]


def test_weight_gradients_under_ddp_over_data_and_sequence_ranks_equal_one_device(pool):
    layer = Layer(None)
    x, weights = _batch()
    (layer(x, seqlen=27) * weights).sum().backward()
    for gradients in pool(4).run(_ddp_step):
        for found, parameter in zip(gradients, layer.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, atol=1e-4, rtol=1e-4)


# The operator


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
            attend(*(x[:, rows] for x in problem.inputs()[:3]), cu_seqlens=cu_seqlens, seqlen=24)
        (call,) = recorder.calls
        tensors = [x.detach().clone().requires_grad_() for x in call[:3]]
        torch.library.opcheck(torch.ops.ringflash.attention.default, (*tensors, *call[3:]))


def test_the_operator_passes_opcheck_on_one_device():
    _operator_check("zigzag")


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
def test_the_operator_passes_opcheck_on_two_ranks(pool, partition):
    pool(2).run(_operator_check, partition, timeout=120)


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
    "shapes do not go together": lambda q, k, v: dict(query=q, key=k[:, :5], value=v),
    "cu_seqlens.*9": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=[0, 9]),
    "cu_seqlens.*5, 3": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=[0, 5, 3, 12]),
    "cu_seqlens.*8": lambda q, k, v: dict(query=q, key=k, value=v, cu_seqlens=torch.tensor([0, 8])),
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
