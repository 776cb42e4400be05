"""Blocks by rows, in rounds or at once: the same model, what they keep and where, and how little is there at once."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import itertools
import re

import pytest
import recipe
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import assert_same
from test_estimate import _sized
from test_memory import _counts, _peak_of

from ringflash import ArgumentError, RingflashError, Sharding, loss
from ringflash.configs.schema import AttentionConfig, ModelConfig
from ringflash.kernels.cpu import blockwise
from ringflash.training.estimate import own as of_own_model
from ringflash.training.memory import rows
from ringflash.training.memory.at_once import OnceBlock
from ringflash.training.memory.host import Moved
from ringflash.training.memory.plan import KEEP, OFFLOAD, PAIRS, RECOMPUTE
from ringflash.training.memory.rounds import RoundBlock

CPU = torch.device("cpu")
SHAPE = ModelConfig(33, 50, 3, 4, 2, head_dim=16)
ROUND = 128
MASKS = (
    AttentionConfig(),
    AttentionConfig(mask="sliding_window", window=50, sink=4),
    AttentionConfig(mask="chunked", chunk=100),
)
LENGTH, BOUNDS = 300, [0, 130, 300, 301, 600]


@pytest.fixture
def short_rounds(monkeypatch):
    """Rounds of `ROUND` queries, so that 600 tokens have five, in place of tens of thousands."""
    monkeypatch.setitem(rows.TILE_ELEMENTS, "cpu", ROUND * 64)


@pytest.fixture(params=[RoundBlock, OnceBlock])
def kind(request, monkeypatch, short_rounds):
    """How blocks by rows attend; at once, as on ranks that share a sequence."""
    if request.param is OnceBlock:
        monkeypatch.setattr(Sharding, "query_rounds", lambda *_: None)
    return request.param


def _model(policy, attention=None, dtype=torch.float32, model=SHAPE, host_bytes=None):
    built = recipe.build(model=model, attention=attention, dtype=dtype)
    built.keep(policy, CPU, host_bytes)
    ids = torch.randint(recipe.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return built, built.shard({"input_ids": ids, "cu_seqlens": BOUNDS})


def _learned(policy, *args, **options):
    """Loss, that of an evaluation, and gradients."""
    model, shard = _model(policy, *args, **options)
    value = model(**shard)
    value.backward()
    with torch.no_grad():
        evaluated = model(**shard)
    return model, [value.detach(), evaluated, *(weight.grad for weight in model.parameters())]


def _assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


def _whole(*args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", 2**21)
        return _learned(KEEP, *args, **options)[1]


_causal_whole = functools.cache(_whole)


@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD, PAIRS])
@pytest.mark.parametrize("attention", MASKS, ids=lambda x: x.mask)
def test_losses_and_gradients_are_those_of_whole_blocks_and_repeat_bit_for_bit(attention, policy, kind):
    model, found = _learned(policy, attention)
    assert (f"recomputed in rounds of {ROUND} queries" in model.memory.decision) == (kind is RoundBlock)
    _assert_close(found, _whole(attention))
    assert all(torch.equal(a, b) for a, b in zip(found, _learned(policy, attention)[1], strict=True))


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("train", [True, False])
def test_tokens_of_another_batch_than_the_sharding_is_of_are_refused(train):
    model, shard = _model(RECOMPUTE)
    shard |= {name: shard[name][:, :-50] for name in ("input_ids", "labels", "position_ids")}
    with torch.set_grad_enabled(train), pytest.raises(ArgumentError, match="query has -100 and key -100 tokens"):
        model(**shard)


@pytest.mark.usefixtures("kind")
@settings(max_examples=10)
@given(placements=st.lists(st.sampled_from([KEEP, RECOMPUTE, OFFLOAD]), min_size=3, max_size=3), pairs=st.booleans())
def test_any_mixture_of_placements_learns_the_same(placements, pairs):
    model, shard = _model(OFFLOAD)
    model.memory.placements, model.memory.pairs = list(placements), pairs
    value = model(**shard)
    value.backward()
    expected, _, *gradients = _causal_whole()
    _assert_close([value.detach(), *(weight.grad for weight in model.parameters())], [expected, *gradients])
    assert model.memory.host.used == 0


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(
    "frozen",
    [
        "embed_tokens",
        "layers.0",
        "q_proj",
        "mlp",
        "layernorm",
        "layers",
        "embed|layers.0",
        "embed|input_layernorm|[qkv]_",
        "embed|self|norm",
    ],
)
def test_weights_that_do_not_learn_have_no_gradient_and_the_others_the_same(frozen):
    gradients = []
    for policy, tile in ((KEEP, 2**21), (RECOMPUTE, ROUND * 64)):
        model, shard = _model(policy)
        for name, weight in model.named_parameters():
            weight.requires_grad_(re.search(frozen, name) is None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
            model(**shard).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] is None) == (expected is None)
        if expected is not None:
            _assert_close([gradients[1][name]], [expected])


class _Adapted(torch.nn.Module):
    """A projection that learns by an adapter of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base, (outputs, inputs) = base, base.weight.shape
        generator = torch.Generator().manual_seed(1)
        self.down = torch.nn.Parameter(torch.randn(2, inputs, generator=generator))
        self.up = torch.nn.Parameter(torch.randn(outputs, 2, generator=generator))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def _adapted(model):
    for block in model.layers:
        block.self_attn.q_proj = _Adapted(block.self_attn.q_proj)


def _capped(model):
    model.layers[0].self_attn.attend.softcap = 0.1


def _hooked(model):
    model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: out * 2)


def _with_gradients_changed(model):
    for weight in model.layers[0].parameters():
        weight.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("change", [_adapted, _capped, _hooked, _with_gradients_changed])
def test_a_block_of_which_rounds_do_not_know_everything_learns_as_a_whole(change):
    found = []
    for policy in (KEEP, RECOMPUTE):
        model, shard = _model(policy)
        change(model)
        value = model(**shard)
        value.backward()
        with torch.no_grad():
            found.append([value.detach(), model(**shard), *(weight.grad for weight in model.parameters())])
    assert all(x is not None for x in found[0])
    _assert_close(*found)


@pytest.mark.usefixtures("short_rounds")
def test_a_model_that_is_compiled_whole_evaluates_whole_blocks(monkeypatch):
    model, shard = _model(KEEP, model=ModelConfig(33, 50, 1, 4, 2, head_dim=16))
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(**shard)
        monkeypatch.setattr(RoundBlock, "without_graph", None)
        torch.testing.assert_close(torch.compile(model, backend="eager")(**shard), expected)


@pytest.mark.parametrize("within", [(True, False), (True, True), (False, True)], ids=["forward", "both", "backward"])
@pytest.mark.parametrize("policy", [RECOMPUTE, PAIRS])
def test_either_pass_may_run_within_autocast(policy, within):
    """Of blocks that are whole if it is the forward pass."""
    found = []
    for each, tile in ((KEEP, 2**21), (policy, ROUND * 64)):
        model, shard = _model(each)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
            with torch.autocast("cpu", torch.bfloat16, enabled=within[0]):
                value = model(**shard)
            with torch.autocast("cpu", torch.bfloat16, enabled=within[1]):
                value.backward()
        found.append([value.detach(), *(weight.grad for weight in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def _steps_by_rows(kind, tile=ROUND * 48, **options):
    """What training leaves, and how many blocks of a kind had a backward pass, in several tiles of rows each."""
    taken, backward = [], kind.backward_of

    def counted(self, inputs, gradients):
        taken.append(len(inputs))
        return backward(self, inputs, gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        patch.setattr(kind, "backward_of", counted)
        return recipe.steps(**options), taken


@pytest.mark.parametrize(
    ("engine", "policy"), [("ddp", OFFLOAD), ("fsdp2", PAIRS), ("zero3", PAIRS), ("zero1", RECOMPUTE)]
)
@pytest.mark.parametrize(("degree", "kind"), [(1, RoundBlock), (2, OnceBlock)])
def test_every_engine_trains_by_rows_as_one_device_does_whole(pool, engine, policy, degree, kind):
    expected = recipe.plain()
    job = {"name": engine, "degree": degree, "micro_batch": 2 * degree, "memory": policy}
    for found, tiles in pool(2).run(_steps_by_rows, kind, **job):
        assert_same(found, expected)
        assert tiles == [2] * 4  # of 202 tokens, in 2 blocks and 2 steps


@pytest.mark.parametrize(("tile", "expected"), [(201, [2] * 4), (203, [])], ids=["by rows", "whole"])
@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_ranks_of_which_one_has_more_tokens_than_a_tile_train_as_one_device_does(pool, engine, tile, expected):
    """They have 204 and 200; ZeRO 2 sums gradients in the order in which they are ready, so that is to be the same."""
    job = {"name": engine, "degree": 2, "memory": RECOMPUTE, "tile": tile * 48}
    for found, tiles in pool(2).run(_steps_by_rows, OnceBlock, **job):
        assert_same(found, recipe.plain())
        assert tiles == expected


def _of_few(policy, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        model = recipe.build(dist.group.WORLD)
        model.keep(policy, CPU)
        shard = model.shard({"input_ids": torch.arange(5)[None]})
        model(**shard).backward()
    gradients = [weight.grad for weight in model.parameters()]
    for each in gradients:
        dist.all_reduce(each)
    return shard["input_ids"].numel(), gradients


@pytest.mark.parametrize("policy", [OFFLOAD, PAIRS])
def test_ranks_without_tokens_take_part_by_rows(pool, policy):
    found, expected = (pool(4).run(_of_few, each, tile) for each, tile in ((policy, 48), (KEEP, 2**21)))
    assert 0 in [tokens for tokens, _ in found]
    for (_, gradients), (_, same) in zip(found, expected, strict=True):
        _assert_close(gradients, same)


def _calls_of_two(policy, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        return _counts(policy)


@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD, PAIRS])
def test_ranks_that_share_a_sequence_attend_and_communicate_as_often_and_move_as_much_by_rows(pool, policy):
    by_rows = pool(2).run(_calls_of_two, policy, ROUND * 48)
    for (calls, moved, gradients), (expected, as_much, same) in zip(
        by_rows, pool(2).run(_calls_of_two, policy, 2**21), strict=True
    ):
        for name in ("attend", "attend_backward", "transfer"):
            assert calls[name] == expected[name] >= 2
        assert moved == as_much
        _assert_close(gradients, same)


def _calls(policy):
    counts = collections.Counter()

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("attend", "attend_backward"):
            patch.setattr(blockwise, name, counting(name, getattr(blockwise, name)))
        model, shard = _model(policy)
        model(**shard).backward()
    return counts, model


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD, PAIRS])
def test_attention_runs_once_for_each_round_and_never_again(policy):
    counts, model = _calls(policy)
    assert counts == {"attend": 5 * 3, "attend_backward": 5 * 3}
    tokens, size = 2 * LENGTH, 4
    inputs = 33 * {RECOMPUTE: 0, OFFLOAD: 3, PAIRS: 2}[policy]  # of pairs the first and, alone, the third
    attended = (64 + 4) * (0 if policy == RECOMPUTE else 3)  # out and log-sum-exp
    moved = 0 if model.memory.host is None else model.memory.host.moved
    assert moved == tokens * size * (inputs + attended)


@pytest.mark.usefixtures("kind")
def test_without_room_in_host_memory_rounds_are_kept_where_they_are():
    model, found = _learned(OFFLOAD, host_bytes=0)
    assert model.memory.host.moved == 0
    _assert_close(found, _causal_whole())


@pytest.mark.usefixtures("kind")
def test_pages_of_a_pass_without_a_backward_pass_are_used_again():
    model, shard = _model(PAIRS)
    for _ in range(2):
        value = model(**shard)
        assert model.memory.host.used > 0
        del value
        gc.collect()
        assert model.memory.host.used == 0


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD])
def test_a_second_backward_pass_is_refused(policy):
    model, shard = _model(policy)
    value = model(**shard)
    value.backward(retain_graph=True)
    with pytest.raises(RingflashError, match=r"ran twice; engine\.memory=keep"):
        value.backward()


@pytest.mark.usefixtures("kind")
def test_a_backward_pass_of_a_pairs_first_block_before_that_of_the_second_is_refused():
    model, shard = _model(PAIRS)
    streams = []
    model.layers[0].register_forward_hook(lambda module, inputs, out: streams.append(out))
    model.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
    value = model(**shard)
    streams[0].sum().backward()
    with pytest.raises(RingflashError, match=r"ran twice; engine\.memory=keep"):
        value.backward()


@pytest.mark.usefixtures("short_rounds")
def test_what_moved_comes_back_one_round_ahead(monkeypatch):
    model, shard = _model(OFFLOAD, model=ModelConfig(33, 50, 1, 4, 2, head_dim=16))
    value = model(**shard)
    order, fetch, silu = [], Moved.fetch, torch.nn.functional.silu

    def fetched(self, again=False):
        if self._there is None and not again:
            order.append("back")
        fetch(self, again)

    monkeypatch.setattr(Moved, "fetch", fetched)
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: order.append("feed-forward") or silu(x))
    value.backward()
    # Of each round come back its input, out and log-sum-exp, as the feed-forward of the round before it begins.
    places = [place for place, what in enumerate(order) if what == "feed-forward"]
    assert [order[:place].count("back") for place in places] == [6, 9, 12, 15, 15]


# Memory at once


def _peak(policy, tokens, dtype=torch.float32, blocks=2, train=True, alone=True):
    """Bytes at once, and what is said of them; documents are short, as attention on CPUs has tensors of its own."""
    heads = 2 if alone else 8  # to all queries at once, kernels on CPUs have keys for each query head
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": heads}
    model = recipe.build(model=ModelConfig(**shape, num_hidden_layers=blocks, head_dim=32), dtype=dtype)
    model.keep(policy, CPU)
    shard = model.shard(
        {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "cu_seqlens": range(0, tokens + 1, 256)}
    )
    model(**shard).backward()  # gradients, pages of the host and rounds are there from now on
    peak = _peak_of(lambda: model(**shard).backward()) if train else _peak_of(lambda: _evaluate(model, shard))
    keys = [f"model.{name}={value}" for name, value in {**shape, "num_hidden_layers": blocks, "head_dim": 32}.items()]
    precision = "fp32" if dtype == torch.float32 else "bf16"
    sizes = _sized([f"engine.precision={precision}", f"train.seqlen={tokens}", *keys], 1)
    sizes = dataclasses.replace(sizes, alone=alone)
    kept = blocks * sizes.kept(False) if policy == RECOMPUTE else 0
    return peak, kept + sizes.transient(0, policy != RECOMPUTE, policy == PAIRS), sizes


@torch.no_grad()
def _evaluate(model, shard):
    model(**shard)


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of 2^17 elements, rounds of 512 tokens, and parts of keys' gradients of as many: documents are shorter."""
    monkeypatch.setattr(of_own_model, "PIECE", 512)
    for elements, device in itertools.product((rows.TILE_ELEMENTS, loss.CHUNK_ELEMENTS), ("cpu", "cuda")):
        monkeypatch.setitem(elements, device, 1 << 17)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("alone", [True, False], ids=["in rounds", "at once"])
@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD, PAIRS])
def test_a_pass_has_as_much_in_use_at_once_as_is_said(monkeypatch, policy, alone):
    if not alone:  # as on ranks that share the sequence
        monkeypatch.setattr(Sharding, "query_rounds", lambda *_: None)
    found, said, sizes = _peak(policy, 4096, alone=alone)
    assert sizes.tokens == 8 * sizes.rows
    assert found == pytest.approx(said, rel=0.1)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_longer_sequence_only_streams_keys_and_their_gradients_take_more(dtype):
    (less, said, _), (more, said_of_more, _) = (_peak(OFFLOAD, tokens, dtype) for tokens in (4096, 8192))
    grown, stream = more - less, 4096 * 256 * dtype.itemsize
    assert grown == pytest.approx(said_of_more - said, rel=0.05)
    assert grown < (2 + 0.5) * stream + 4096 * 128 * 4 * 1.3  # keys, their gradients in fp32, angles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringflash.training.model.transformer.Block._parts", lambda *_: None)
        whole = _peak(OFFLOAD, 8192, dtype)[0] - _peak(OFFLOAD, 4096, dtype)[0]
    assert whole > 2 * grown


@pytest.mark.usefixtures("tiles")
def test_evaluation_is_in_rounds_too_and_keeps_nothing_as_wide_as_the_feed_forward():
    stream = 4096 * 256 * 4
    for policy, most in ((RECOMPUTE, 3.5), (KEEP, 3.5)):  # a stream in and out, keys and values, angles
        grown = _peak(policy, 8192, train=False)[0] - _peak(policy, 4096, train=False)[0]
        assert grown < most * stream
