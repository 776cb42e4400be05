"""Attention over 1 to 8 ranks is attention on one device: any mask, partition, dtype and length, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import (
    MASKS,
    OTHERS,
    PARTITIONS,
    RESULTS,
    Shape,
    any_blocks,
    any_mask,
    assert_as_exact_as_torch,
    blocks,
    errors,
    exact,
    log_sum_exp,
    masks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ring import Problem, assert_ring_is_exact, joined, one_device, solve

from ringflash import DistributedFlashAttention, Mask, Partition

LENGTH = 61
"""Prime, so that it divides by nothing."""


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_mask_under_every_partition_equals_one_device(pool, ranks, name, partition):
    assert_ring_is_exact(pool, ranks, Problem(masks(LENGTH)[name], Shape(length=LENGTH), partition))


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", ["causal", "bidirectional", "documents-window-sink", "prefix", "blocks"])
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
    partition = data.draw(st.sampled_from([*PARTITIONS, *OTHERS]))
    problem = Problem(mask, Shape(length=length), partition, seed=seed)
    assert_ring_is_exact(pool, ranks, problem)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), length=st.integers(1, 80), ranks=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_layout_of_blocks_under_every_partition(pool, data, length, ranks, seed):
    mask = data.draw(any_mask(length)) & data.draw(any_blocks(length))
    problem = Problem(mask, Shape(length=length), data.draw(st.sampled_from(PARTITIONS)), seed=seed)
    assert_ring_is_exact(pool, ranks, problem)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_layout_of_blocks_holds_for_each_document_and_each_sequence(pool, partition):
    batch = Problem(blocks(29, 29, 4, seed=5) & Mask.causal(), Shape(batch=2, length=29), partition)
    packed = Problem(blocks(29, 29, 4, seed=5), Shape(length=LENGTH), partition, cu_seqlens=(0, 3, 32, 32, 60, 61))
    for problem in (batch, packed):
        for ranks in (1, 2, 4):
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


def test_results_repeat_bit_for_bit_when_asked(pool):
    problem = Problem(masks(LENGTH)["documents-causal"], dtype=torch.bfloat16, deterministic=True)
    first, second = solve(pool, 4, problem), solve(pool, 4, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_as_exact_as_torch(second, problem.inputs(), problem.seen)
