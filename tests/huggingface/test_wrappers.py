"""Training under the wrappers that people use: after three steps of AdamW the weights are those of one device.

Every step has documents of other lengths, so that ranks have unequal shares of tokens and of targets.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import peft
import pytest
import torch
import torch.distributed as dist
from batches import IGNORED, KINDS, draw, gradients, learn_alone, masked_prompt, packed, padded
from families import build
from families import draw as draw_weights
from learning import LOSS, assert_learned, assert_same_loss, over_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from ringflash.deepspeed import import_deepspeed
from ringflash.transformers import SequenceParallel

WEIGHTS = 2e-5
"""Largest error of a weight, of the largest of its tensor."""

# A large eps makes the update linear in the gradient: Adam would turn rounding into whole steps where that is almost 0.
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-2, "weight_decay": 0.1}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}

STEPS = [
    packed([draw(19, 1, 30, 11)], boundaries=True),
    masked_prompt(draw(33, 33, seed=1), answer=4),
    padded(draw(12, 26, seed=2), "left"),
    padded(draw(25, 8, seed=3), "right"),
    packed([draw(9, 22, seed=4), draw(30, 1, seed=5)], boundaries=False),
    masked_prompt(draw(29, 29, seed=6), answer=9),
]
"""Batches; three steps take the first three, or all with accumulation."""


def _micro_batches(accumulated):
    """Batches of each of three steps, with what the targets of the whole step are to be divided by."""
    size = 2 if accumulated else 1
    steps = [STEPS[i : i + size] for i in range(0, 3 * size, size)]
    return [[(documents, sum(x.valid for x in step)) for documents in step] for step in steps]


# One device


def _whole_loss(model, documents, count):
    ids = pad_sequence(documents.ids, batch_first=True)
    targets = pad_sequence(documents.targets, batch_first=True, padding_value=IGNORED)
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum") / count


@lru_cache
def _one_device(family, accumulated=False, lora=False):
    """Losses and weights of the eager model."""
    model = _with_lora(build(family, "eager")) if lora else build(family, "eager")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses = []
    for step in _micro_batches(accumulated):
        parts = [_whole_loss(model, documents, count) for documents, count in step]
        sum(parts).backward()
        losses.append(sum(parts).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


def _assert_trained(results, expected):
    losses, weights = expected
    assert abs(losses[-1] - losses[0]) > 1e-2  # something was learned
    for found, state in results:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=LOSS, atol=0)
        assert state.keys() == weights.keys()
        for name, weight in weights.items():
            tolerance = WEIGHTS * weight.abs().max().item()
            torch.testing.assert_close(state[name], weight, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# Over ranks


def _with_lora(model):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    draw_weights(wrapped)  # or one of the two matrices would be zero
    return wrapped


def _by_hand(model):
    return model


def _ddp(model):
    return DistributedDataParallel(model)


def _fsdp2(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _checkpointing(reentrant):
    def wrap(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return wrap


def _fsdp2_with_checkpointing(model):
    return _fsdp2(_checkpointing(False)(model))


def _fsdp2_with_a_head_of_its_own(model):
    """Whose weight is whole during the head's forward and backward passes alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    return _fsdp2(model)


WRAPPERS = {
    "by_hand": _by_hand,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "checkpointing": _checkpointing(False),
    "reentrant_checkpointing": _checkpointing(True),
    "fsdp2_with_checkpointing": _fsdp2_with_checkpointing,
    "lora": _with_lora,
    "fsdp2_with_a_head_of_its_own": _fsdp2_with_a_head_of_its_own,
}
AVERAGES = ("ddp", "fsdp2", "fsdp2_with_checkpointing", "fsdp2_with_a_head_of_its_own")
"""These average gradients over the ranks themselves."""


def _train(name, family="llama", fused=False, accumulated=False):
    """Reported losses, and whole weights."""
    model = build(family, "ring")
    sequence = SequenceParallel(model)
    if fused:
        sequence.fuse_loss()
    wrapped = WRAPPERS[name](model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), **ADAMW)
    losses = []
    for step in _micro_batches(accumulated):
        total = 0.0
        for documents, count in step:
            batch = documents.batch | ({"num_items_in_batch": torch.tensor(count)} if accumulated else {})
            output = wrapped(**sequence.shard(batch), use_cache=False)
            assert (output.logits is None) == fused
            output.loss.backward()
            total += sequence.reported(output.loss).item()
        losses.append(total)
        if name not in AVERAGES:
            for weight in wrapped.parameters():
                if weight.grad is not None:
                    weight.grad = over_ranks(weight.grad)
        optimizer.step()
        optimizer.zero_grad()
    named = wrapped.module if name == "ddp" else wrapped
    weights = {key: x.detach() for key, x in named.named_parameters()}
    return losses, {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in weights.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("accumulated", [False, True], ids=["", "accumulated"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_ranks_train_as_one_device_does(pool, name, accumulated, fused):
    expected = _one_device("llama", accumulated, lora=name == "lora")
    _assert_trained(pool(2).run(_train, name, accumulated=accumulated, fused=fused), expected)


@pytest.mark.parametrize("name", ["by_hand", "fsdp2"])
def test_a_fused_loss_keeps_softcap_and_tied_weights(pool, name):
    _assert_trained(pool(2).run(_train, name, family="gemma2", fused=True), _one_device("gemma2"))


def test_three_ranks_train_as_one_device_does(pool):
    _assert_trained(pool(3).run(_train, "ddp", accumulated=True), _one_device("llama", accumulated=True))


# Compiled


def _learn_compiled(whole, family, batch):
    """A step of a model that is compiled as a whole, or of each of its layers in one graph."""
    torch.compiler.reset()
    model = build(family, "ring")
    sequence = SequenceParallel(model)
    for layer in () if whole else model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    wrapped = torch.compile(model, backend="eager") if whole else model
    loss = wrapped(**sequence.shard(batch), use_cache=False).loss
    loss.backward()
    return {
        "mean": over_ranks(loss.detach().clone()),
        "reported": sequence.reported(loss),
        "gradients": {name: over_ranks(x) for name, x in gradients(model).items()},
    }


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers_in_one_graph"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "packed_by_positions"), ("gemma2", "left_padded")])
def test_compiled_models_learn_as_one_device_does(pool, family, kind, whole):
    documents, model = KINDS[kind](), build(family, "eager")
    loss = learn_alone(model, documents)
    results = pool(2).run(_learn_compiled, whole, family, documents.batch, timeout=240)
    assert_learned(results, loss, gradients(model))


# DeepSpeed, with what users have in their JSON


def _settings(stage, accumulated):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 if accumulated else 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
    }


def _train_with_deepspeed(stage, family="llama", fused=False, accumulated=False):
    deepspeed = import_deepspeed(torch.device("cpu"))
    model = build(family, "ring")
    sequence = SequenceParallel(model)
    if fused:
        sequence.fuse_loss()
    config = _settings(stage, accumulated)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for step in _micro_batches(accumulated):
        total = 0.0
        for documents, count in step:
            batch = documents.batch | ({"num_items_in_batch": torch.tensor(count)} if accumulated else {})
            output = engine(**sequence.shard(batch), use_cache=False)
            assert (output.logits is None) == fused
            # As transformers.Trainer does: what the loss is divided by counts all micro-batches already.
            engine.backward(output.loss, scale_wrt_gas=False)
            engine.step()
            total += sequence.reported(output.loss).item()
        losses.append(total)
    whole = deepspeed.utils.safe_get_full_fp32_param
    return losses, {name: whole(weight).clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("accumulated", [False, True], ids=["", "accumulated"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_train_under_deepspeed_as_one_device_does(pool, stage, accumulated, fused):
    results = pool(2).run(_train_with_deepspeed, stage, accumulated=accumulated, fused=fused)
    _assert_trained(results, _one_device("llama", accumulated))


def test_a_fused_loss_keeps_softcap_and_tied_weights_under_zero_3(pool):
    _assert_trained(pool(2).run(_train_with_deepspeed, 3, "gemma2", fused=True), _one_device("gemma2"))


# Data ranks beside sequence ranks


def _two_by_two(name, accumulated):
    """DDP or FSDP2 over all four ranks, each two of which share a sequence; data rank r takes batches r, r + 2 ..."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = build("llama", "ring")
    sequence = SequenceParallel(model, mesh["cp"])
    wrapped = WRAPPERS[name](model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), **ADAMW)
    losses = []
    for step in (STEPS[:2], STEPS[2:4], STEPS[4:]):
        batch = step[mesh.get_local_rank("dp")].batch
        if accumulated:  # as a Trainer counts: over the data ranks, to be averaged by the engine
            batch = batch | {"num_items_in_batch": sum(x.valid for x in step) / 2}
        loss = wrapped(**sequence.shard(batch), use_cache=False).loss
        loss.backward()
        losses.append(over_ranks(loss.detach().clone()).item())
        optimizer.step()
        optimizer.zero_grad()
    named = wrapped.module if name == "ddp" else wrapped
    weights = {key: x.detach() for key, x in named.named_parameters()}
    return losses, {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in weights.items()}


def _two_batches_a_step(accumulated):
    """The same on one device: the mean of two batches' losses, or of all their targets."""
    model = build("llama", "eager")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses = []
    for step in (STEPS[:2], STEPS[2:4], STEPS[4:]):
        counts = [sum(x.valid for x in step)] * 2 if accumulated else [2 * x.valid for x in step]
        loss = sum(_whole_loss(model, documents, count) for documents, count in zip(step, counts, strict=True))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("counted", [False, True], ids=["by_batch", "by_target"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_data_and_sequence_ranks_together_train_as_one_device_does(pool, name, counted):
    _assert_trained(pool(4).run(_two_by_two, name, counted), _two_batches_a_step(counted))


# What SequenceParallel is given


def _sequence_of(what):
    """Losses of models whose SequenceParallel was made in another order, or twice."""
    model = build("gemma2", "ring")
    first = SequenceParallel(model)
    wrapped = DistributedDataParallel(model) if what == "wrapper" else model
    sequence = SequenceParallel(wrapped, partition="contiguous" if what == "twice" else "zigzag")
    if what == "copy":
        first.fuse_loss()
        wrapped = copy.deepcopy(model)
        sequence = SequenceParallel(wrapped)
    losses = []
    for documents in STEPS[:2]:
        for fused in (False, True):
            if fused:
                sequence.fuse_loss()
            losses.append(sequence.reported(wrapped(**sequence.shard(documents.batch), use_cache=False).loss))
    mine = first.shard(STEPS[1].batch)
    return [*losses, first.reported(model(**mine, use_cache=False).loss)]


@pytest.mark.parametrize("what", ["model", "wrapper", "twice", "copy"])
def test_a_model_may_have_several_wrappers(pool, what):
    model = build("gemma2", "eager")
    first, second = (learn_alone(model, documents) for documents in STEPS[:2])
    for losses in pool(2).run(_sequence_of, what):
        for loss, expected in zip(losses, [first, first, second, second, second], strict=True):
            assert_same_loss(loss, expected)


# What a fused loss leaves as it was, and what it saves


class _LargestLogits(TorchDispatchMode):
    """The most elements that a tensor with a row for the vocabulary had."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.vocabulary,):
                self.most = max(self.most, x.numel())
        return result


def _largest_logits(fused, tokens, vocabulary):
    model = build("llama", "ring", vocab_size=vocabulary, hidden_size=16)
    sequence = SequenceParallel(model)
    if fused:
        sequence.fuse_loss()
    (ids,) = draw(tokens)
    with _LargestLogits(vocabulary) as seen:
        model(**sequence.shard({"input_ids": ids[None], "labels": ids[None]}), use_cache=False).loss.backward()
    return seen.most


def test_a_fused_loss_never_makes_the_logits_of_all_tokens():
    tokens, vocabulary = 4096, 5003
    assert _largest_logits(False, tokens, vocabulary) >= tokens * vocabulary
    assert _largest_logits(True, tokens, vocabulary) <= tokens * vocabulary / 2


def _generate_after_fusing():
    model = build("gemma2", "ring").eval()
    sequence = SequenceParallel(model)
    sequence.fuse_loss()
    documents = KINDS["one_document"]()
    fused = sequence.reported(model(**sequence.shard(documents.batch), use_cache=False).loss)
    with sequence.alone(), torch.no_grad():
        prompt = {"input_ids": documents.batch["input_ids"]}
        made = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return fused, made, model(**prompt).logits


def test_a_model_with_a_fused_loss_still_generates(pool):
    model = build("gemma2", "eager").eval()
    batch = KINDS["one_document"]().batch
    with torch.no_grad():
        made = model.generate(batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        expected = model(**copy.copy(batch))
    for loss, found, logits in pool(2).run(_generate_after_fusing):
        assert_same_loss(loss, expected.loss)
        assert torch.equal(found, made)
        torch.testing.assert_close(logits, expected.logits, rtol=0, atol=WEIGHTS * expected.logits.abs().max().item())
