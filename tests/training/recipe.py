"""Small training runs that tests hand to the workers, and the plain PyTorch run they must equal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringflash import shard_batch
from ringflash.configs.schema import AttentionConfig, EngineConfig, ModelConfig, OptimizerConfig
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.checkpoint.saving import Saver
from ringflash.training.engines.create import create_engine, parameter_shapes
from ringflash.training.model.transformer import Transformer

# Sizes that 2 and 4 ranks do not divide. Adam's first steps would turn rounding into whole steps where a gradient is
# almost zero; a large eps makes the update linear in the gradient.
MODEL = ModelConfig(33, 50, 2, 3, 1, head_dim=16)
OPTIMIZER = OptimizerConfig(lr=1e-1, eps=1e-2, weight_decay=0.1, clip=0.3)
VOCABULARY, SEQLEN, SEQUENCES = 65, 101, 4
DOCUMENTS = ([0, 17, 101], [0, 101], [0, 50, 51, 101], [0, 99, 101])


def build(group=None, model=MODEL, device="cpu", attention=None, **options):
    """The same initial weights on every device; on the meta device what an engine takes."""
    with torch.device("meta" if device == "meta" else "cpu"):
        built = Transformer(model, VOCABULARY, attention or AttentionConfig(), group, **options).to(device)
    draw = built.initialise
    built.initialise = lambda name, weight: weight.copy_(_on_cpu(draw, name, weight))
    return built


def _on_cpu(draw, name, weight):
    value = torch.empty_like(weight, device="cpu")
    draw(name, value)
    return value


def batches(step):
    """The four sequences of a step, each with its documents."""
    ids = torch.randint(VOCABULARY, (SEQUENCES, SEQLEN), generator=torch.Generator().manual_seed(step))
    return [{"input_ids": ids[i : i + 1], "cu_seqlens": DOCUMENTS[i]} for i in range(SEQUENCES)]


def together(rows):
    """One batch of several sequences."""
    bounds = [0]
    for index, row in enumerate(rows):
        bounds += [index * SEQLEN + bound for bound in row["cu_seqlens"][1:]]
    return {"input_ids": torch.cat([row["input_ids"] for row in rows]), "cu_seqlens": bounds}


def steps(
    name,
    degree,
    first=0,
    last=2,
    micro_batch=SEQUENCES,
    dtype=torch.float32,
    folder=None,
    resume=None,
    tied=True,
    optimizer=OPTIMIZER,
    device="cpu",
    memory="keep",
    settings=None,
    **options,
):
    """Train from step `first` to `last` on all ranks of this worker's pool.

    Returns [(loss, gradient norm), ...] and the engine's state; saves to `folder` at the end, starts from `resume`.
    `settings` are further ones of the engine.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (world // degree, degree), mesh_dim_names=("data", "sequence"))
    group, data_rank, data_ranks = mesh["sequence"].get_group(), mesh["data"].get_local_rank(), world // degree
    model = build(group, replace(MODEL, tie_word_embeddings=tied), device="meta", dtype=dtype, **options)
    found = None if resume is None else Checkpoint(Path(resume))
    if found is not None:
        found.check_shapes(parameter_shapes(model))
        assert found.state == {"step": first}
    accumulation = SEQUENCES // (micro_batch * data_ranks)
    read = None if found is None else found.read
    config = EngineConfig(name, memory=memory, **(settings or {}))
    engine = create_engine(model, torch.device(device), config, optimizer, accumulation, read, first)
    curve = []
    for step in range(first, last):
        mine = batches(step)[data_rank::data_ranks]
        micro = [together(mine[i : i + micro_batch]) for i in range(0, len(mine), micro_batch)]
        for batch in micro:
            batch["input_ids"] = batch["input_ids"].to(device)
        loss, norm, _ = engine.train_step([shard_batch(batch, group) for batch in micro], optimizer.lr)
        curve.append((loss.item(), norm.item()))
    if folder is not None:
        save(engine, Path(folder), last)
    return curve, whole(engine)


def save(engine, folder, step):
    """Write a checkpoint of an engine on all ranks."""
    Saver(folder, torch.device("cpu"), keep=9).save(step, engine.pieces(), engine.sizes(), {"step": step})


def stored(path):
    """Every tensor of a checkpoint by its name."""
    found = Checkpoint(Path(path))
    return {name: found.read(name) for name in found.sizes}


def whole(engine, kind=""):
    """Whole tensors of an engine's state, of one kind or all, by name, from the pieces of all ranks."""
    pieces = [piece for piece in engine.pieces() if piece.name.startswith(kind)]
    mine = [(piece.name, piece.start, piece.take().detach().cpu().clone()) for piece in pieces]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    sizes = {name: shape for name, shape in engine.sizes().items() if name.startswith(kind)}
    found = {name: torch.full((math.prod(shape),), math.nan) for name, shape in sizes.items()}
    for name, start, part in (piece for pieces in everyone for piece in pieces):
        assert found[name][start : start + len(part)].isnan().all(), f"{name} has elements that two ranks write"
        found[name][start : start + len(part)] = part
    return {name: x.view(sizes[name]) for name, x in found.items()}


def plain(last=2, tied=True, optimizer=OPTIMIZER):
    """The same run on one device without any engine: torch's cross entropy, autograd and AdamW over the whole step."""
    model = build(model=replace(MODEL, tie_word_embeddings=tied))
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    curve = []
    for step in range(last):
        batch = together(batches(step))
        shard = shard_batch(batch)
        labels = shard.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**shard).flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip or float("inf"))
        adam.step()
        adam.zero_grad()
        curve.append((loss.item(), norm.item()))
    state = {}
    for name, weight in model.named_parameters():
        state[f"weight/{name}"] = weight.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}/{name}"] = adam.state[weight][moment]
    return curve, state
