"""The ring over NCCL: one rank for each of this machine's GPUs, two at least, against float64 and against one GPU.

python -m pytest -m gpu tests/parallel
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import PARTITIONS, RESULTS, Shape, assert_as_exact_as_torch, exact, masks
from pool import Pool
from ring import Problem, attend_share, joined, one_device

from ringflash import DistributedFlashAttention, Mask, shard, unshard

pytestmark = pytest.mark.gpu

LENGTH = 1531
"""Prime: shares end within tiles, on every rank elsewhere."""

SHAPE = Shape(length=LENGTH, heads=8, key_heads=2, head_dim=128)


@pytest.fixture(scope="module")
def gpus():
    found = torch.cuda.device_count()
    if found < 2:
        pytest.skip(f"needs two GPUs or more, there {'is' if found == 1 else 'are'} {found}")
    with Pool(found, timeout=240.0, backend="cpu:gloo,cuda:nccl") as pool:
        yield pool


def _attend(problem):
    return attend_share(problem, device="cuda")


def solve(gpus, problem):
    return {name: x.cuda() for name, x in joined(problem, gpus.run(_attend, problem)).items()}


def assert_ring_is_exact(gpus, problem):
    results = solve(gpus, problem)
    assert_as_exact_as_torch(results, [x.cuda() for x in problem.inputs()], problem.seen.cuda(), problem.scale)
    return results


def _rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    "name", ["causal", "bidirectional", "documents-causal", "window", "window-sink", "prefix", "blocks-small"]
)
def test_every_gpu_together_equal_one_gpu(gpus, name, partition):
    problem = Problem(masks(LENGTH)[name], SHAPE, partition, torch.bfloat16)
    results = assert_ring_is_exact(gpus, problem)
    alone = one_device(problem, "cuda")
    oracle = exact([x.cuda() for x in problem.inputs()], problem.seen.cuda())
    for x in RESULTS:
        error = _rms(results[x].double() - oracle[x])
        assert error <= 1.1 * _rms(alone[x].cuda().double() - oracle[x]), x


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(gpus, dtype):
    assert_ring_is_exact(gpus, Problem(masks(LENGTH)["documents-causal"], SHAPE, dtype=dtype))


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 130])
def test_short_and_uneven_lengths_and_gpus_without_tokens(gpus, length, partition):
    shape = Shape(length=length, heads=4, key_heads=2, head_dim=64)
    for mask in (Mask.causal(), Mask.bidirectional()):
        assert_ring_is_exact(gpus, Problem(mask, shape, partition, torch.bfloat16))


@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
def test_batches_with_documents_given_by_the_call(gpus, partition):
    shape = Shape(batch=3, length=301, heads=4, key_heads=1, head_dim=64)
    cuts = (0, 100, 101, 450, 700, 903)
    assert_ring_is_exact(gpus, Problem(Mask.causal(), shape, partition, torch.bfloat16, cu_seqlens=cuts))


def test_deterministic_gradients_repeat_bit_for_bit(gpus):
    problem = Problem(masks(LENGTH)["documents-causal"], SHAPE, dtype=torch.bfloat16, deterministic=True)
    first, second = solve(gpus, problem), solve(gpus, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _compiled():
    attend = torch.compile(DistributedFlashAttention(Mask.causal()), fullgraph=True, backend="aot_eager")
    plain = DistributedFlashAttention(Mask.causal())
    torch.manual_seed(dist.get_rank())
    for tokens in (128, 192):
        leaf = torch.randn(1, tokens, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        expected = torch.autograd.grad(plain(leaf, leaf, leaf).square().sum(), leaf)
        found = torch.autograd.grad(attend(leaf, leaf, leaf).square().sum(), leaf)
        torch.testing.assert_close(found, expected)


def test_it_compiles_without_graph_breaks(gpus):
    gpus.run(_compiled)


def _round_trip(partition):
    dealt = {"partition": partition, "mask": Mask.causal()}
    x = torch.arange(3 * 17.0, device="cuda").view(3, 17).requires_grad_()
    whole = unshard(shard(x, 1, **dealt), 1, **dealt)
    assert torch.equal(whole, x)
    whole.sum().backward()
    held = shard(torch.arange(17, device="cuda"), 0, **dealt)
    assert (x.grad[:, held] == dist.get_world_size()).all()
    assert x.grad.sum() == 3 * len(held) * dist.get_world_size()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_shard_and_unshard(gpus, partition):
    gpus.run(_round_trip, partition)
