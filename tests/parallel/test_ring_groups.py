"""Which ranks share a sequence: one device, sub-groups, mesh dimensions, and data-parallel groups around them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import Shape, assert_as_exact_as_torch, exact, inputs, masks
from ring import Layer, Problem, attend_share, joined, one_device
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringflash import ArgumentError, DistributedFlashAttention, Mask

LENGTH = 61


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
    outsider, outside = dist.new_group([0, 1]), DeviceMesh("cpu", [0, 1])
    if dist.get_rank() >= 2:
        with pytest.raises(ArgumentError, match="group: this rank is not a member"):
            DistributedFlashAttention(group=outside)
        with pytest.raises(ArgumentError, match="group"):
            DistributedFlashAttention(group=outsider)(*inputs(Shape(length=4))[:3])


def test_groups_that_name_no_sequence_ranks_are_refused(pool):
    pool(4).run(_attend_over_whole_mesh)


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
