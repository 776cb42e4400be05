"""What docs/problems.md says of Transformers models and no other test shows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from finetuning import build, documents_of, gradients_of, scale
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash import ArgumentError
from ringflash.transformers import SequenceParallel

# Layers that attend to what an indexer selects

SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "index_head_dim": 16}
SPARSE = {
    "deepseek_v32": "indexed_attention",
    "glm_moe_dsa": "indexed_attention",
    "deepseek_v4": "compressed_attention",
}
"""Models, and what their layers' types are called."""


def _shard_sparse(family):
    config = AutoConfig.for_model(family, **SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    with pytest.raises(ArgumentError) as caught:
        SequenceParallel(model)
    return str(caught.value)


@pytest.mark.parametrize("family", SPARSE)
def test_layers_that_attend_to_what_an_indexer_selects_are_refused_by_name(pool, family):
    for message in pool(2).run(_shard_sparse, family):
        assert message.startswith("layer 0 of ")
        assert SPARSE[family] in message


# Batches of different lengths on groups of different sizes


def _steps_on_groups_of_different_sizes():
    """A long batch on four ranks, then two short ones, each on two: how the steps change the weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model = build("ring")
    by_size = {4: SequenceParallel(model), 2: SequenceParallel(model, mesh["sequence"])}
    wrapped = DistributedDataParallel(model)
    batches = {4: documents_of(0).batch, 2: documents_of(mesh.get_local_rank("data")).batch}
    changes = {}
    for size in (4, 2):
        wrapped(**by_size[size].shard(batches[size]), use_cache=False).loss.backward()
        changes[size] = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        wrapped.zero_grad()
    assert dist.get_world_size() == 4
    return changes


def test_each_batch_may_lie_on_as_many_ranks_as_it_needs(pool):
    for changes in pool(4).run(_steps_on_groups_of_different_sizes):
        assert scale(changes[4], gradients_of(1)) == pytest.approx(1, rel=1e-4)
        assert scale(changes[2], gradients_of(2)) == pytest.approx(1, rel=1e-4)
