"""What is kept of blocks for the backward pass: what runs again, what moves, what is there at once, who decides."""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import math
import weakref

import pytest
import recipe
import torch
import torch.distributed as dist
from folders import write_folder
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ringflash import ArgumentError, RingflashError, shard_batch
from ringflash.configs.schema import EngineConfig, ModelConfig
from ringflash.kernels.cpu import blockwise
from ringflash.parallel.transport.send_recv import SendRecv
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine
from ringflash.training.memory import available, rows
from ringflash.training.memory import host as host_module
from ringflash.training.memory.available import available_bytes, share_of_host
from ringflash.training.memory.blocks import BlockMemory
from ringflash.training.memory.first_step import FirstStep
from ringflash.training.memory.host import HostMemory, Moved
from ringflash.training.memory.plan import KEEP, OFFLOAD, PAIRS, RECOMPUTE, Measured, placed, said
from ringflash.training.model.pretrained import Pretrained

CPU = torch.device("cpu")
PRODUCTS = ("mm", "addmm", "bmm", "linear")


class _Counted(TorchDispatchMode):
    """Calls of the attention kernel and of the transport, and products of matrices with the weights of blocks."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        # DeepSpeed's for stage 3 stays in a process that had it once, and saves its input only once it has run.
        self._patch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
        for owner, name in ((blockwise, "attend"), (blockwise, "attend_backward"), (SendRecv, "transfer")):
            self._patch.setattr(owner, name, self._counting(name, getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        if not self._in_attention and operator.overloadpacket.__name__ in PRODUCTS:
            self.calls["product"] += 1
        return operator(*arguments, **(named or {}))

    _in_attention = False

    def _counting(self, name, function):
        def counted(*args, **kwargs):
            self.calls[name] += 1
            self._in_attention, outer = True, self._in_attention
            try:
                return function(*args, **kwargs)
            finally:
                self._in_attention = outer

        return counted


def _own(policy, **options):
    model = recipe.build(**options)
    model.keep(policy, CPU)
    return model


def _counts(policy):
    model, shard = _own(policy), shard_batch(recipe.together(recipe.batches(0)))
    with _Counted() as counted:
        model(**shard).backward()
    moved = 0 if model.memory.host is None else model.memory.host.moved
    return counted.calls, moved, [weight.grad for weight in model.parameters()]


def test_in_pairs_the_first_block_runs_once_more_for_the_input_of_the_second_which_is_not_kept(pool):
    for moving, pairs in zip(pool(2).run(_counts, OFFLOAD), pool(2).run(_counts, PAIRS), strict=True):
        for name in ("attend", "attend_backward", "transfer"):
            assert pairs[0][name] == moving[0][name]
        assert pairs[0]["product"] - moving[0]["product"] == 7
        assert 0.7 < pairs[1] / moving[1] < 0.9
        assert all(torch.equal(a, b) for a, b in zip(moving[2], pairs[2], strict=True))


def test_a_block_whose_input_is_not_the_output_of_the_one_before_keeps_it_also_in_pairs():
    def run(policy, change):
        memory = BlockMemory(2)
        memory.start(policy, CPU)
        memory.begin()
        x = torch.linspace(-1, 1, 12).view(1, 3, 4).requires_grad_()
        y = memory.run(lambda x: x.sin() * 2, change(memory.run(lambda x: x.sin() * 2, x)))
        memory.end()
        y.sum().backward()
        return x.grad, 0 if memory.host is None else memory.host.moved // x.nbytes

    for change, inputs in ((lambda x: x, 1), (lambda x: x + 1, 2), (lambda x: x.mul_(3), 2)):
        (expected, _), (found, kept) = (run(policy, change) for policy in (KEEP, PAIRS))
        assert torch.equal(found, expected)
        assert kept == inputs


def _moved_under(engine, policy):
    model = recipe.build(dist.group.WORLD, device="meta")
    settings = EngineConfig(engine, memory=policy)
    made = create_engine(model, CPU, settings, recipe.OPTIMIZER)
    made.train_step([model.shard(recipe.batches(0)[1])], 1e-3)
    return model.memory.host.moved


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_engines_whose_hooks_wrap_blocks_leave_them_in_pairs(pool, engine):
    for moving, pairs in zip(*(pool(2).run(_moved_under, engine, each) for each in (OFFLOAD, PAIRS)), strict=True):
        assert 0.7 < pairs / moving < 0.9


@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD])
def test_recomputed_blocks_run_six_of_seven_products_again_but_attention_and_its_transfers_never(pool, policy):
    for whole, saving in zip(pool(2).run(_counts, KEEP), pool(2).run(_counts, policy), strict=True):
        for name in ("attend", "attend_backward", "transfer"):
            assert saving[0][name] == whole[0][name] >= 2
        # query, key, value, out, gate and up; that of down is wanted by nobody
        assert saving[0]["product"] - whole[0]["product"] == 6 * recipe.MODEL.num_hidden_layers
        assert all(torch.equal(a, b) for a, b in zip(whole[2], saving[2], strict=True))


def test_what_moves_is_each_blocks_input_and_attentions_results(pool):
    tokens, config = recipe.SEQUENCES * recipe.SEQLEN, recipe.MODEL
    width = config.num_attention_heads * config.head_dim
    token = 4 * (config.hidden_size + width + config.num_attention_heads)  # input, out, log-sum-exp
    assert sum(moved for _, moved, _ in pool(2).run(_counts, OFFLOAD)) == config.num_hidden_layers * tokens * token
    assert [moved for _, moved, _ in pool(2).run(_counts, RECOMPUTE)] == [0, 0]


def _of_folder(path, policy):
    model = Pretrained(ModelConfig(path=str(path)))
    for name, weight in list(model.named_parameters()):
        value = torch.nn.Parameter(torch.empty(weight.shape))
        model.initialise(name, value.data)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, value)
    model.keep(policy, CPU)
    return model.train()


def _counts_of_folder(path, policy):
    model = _of_folder(path, policy)
    shard = model.shard(recipe.together(recipe.batches(0)))
    with _Counted() as counted:
        model(**shard).backward()
    return counted.calls, 0 if model.memory.host is None else model.memory.host.moved


def test_layers_of_transformers_are_moved_and_recomputed_but_not_their_attention(pool, tmp_path):
    path = write_folder(tmp_path)
    ((whole, _),), ((saving, moved),) = (pool(1).run(_counts_of_folder, path, each) for each in (KEEP, OFFLOAD))
    assert saving["attend"] == whole["attend"] == saving["attend_backward"] == 2
    assert saving["product"] - whole["product"] == 2 * 6
    assert moved == 2 * recipe.SEQUENCES * recipe.SEQLEN * 4 * (32 + 32 + 4)


@given(st.lists(st.sampled_from([KEEP, RECOMPUTE, OFFLOAD]), min_size=3, max_size=3))
def test_any_mixture_of_placements_gives_the_same_gradients(placements):
    gradients = []
    for each in ([KEEP] * 3, placements):
        model = _own(OFFLOAD, model=ModelConfig(33, 50, 3, 3, 1, head_dim=16))
        model.memory.placements = list(each)
        model(**shard_batch(recipe.batches(0)[1])).backward()
        gradients.append([weight.grad for weight in model.parameters()])
        assert model.memory.host.used == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class _Tape:
    """In the place of a GPU's streams, which end nothing."""

    def __init__(self, patch):
        patch.setattr(torch.cuda, "current_stream", lambda _=None: self)
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def wait_event(self, _):
        pass

    def wait_stream(self, _):
        pass

    def record_event(self):
        return None


def test_a_pass_that_fails_leaves_nothing_of_its_blocks_on_the_device(monkeypatch):
    memory, inputs = BlockMemory(3), []
    memory.start(OFFLOAD, CPU)
    memory.host.stream = _Tape(monkeypatch)

    def block(x):
        if len(inputs) == 3:
            raise ZeroDivisionError
        return x.sin()

    def run():
        memory.begin()
        x = torch.ones(2, 3, 4, requires_grad=True)
        for _ in range(3):
            inputs.append(weakref.ref(x.untyped_storage()))
            x = memory.run(block, x)

    with pytest.raises(ZeroDivisionError):
        run()
    gc.collect()
    memory.begin()
    assert [each() for each in inputs] == [None] * 3
    assert memory.host.used == 0


def test_what_moved_comes_back_one_block_ahead(monkeypatch):
    model = _own(OFFLOAD, model=ModelConfig(33, 50, 4, 3, 1, head_dim=16))
    loss = model(**shard_batch(recipe.batches(0)[1]))
    order, fetch, silu = [], Moved.fetch, torch.nn.functional.silu

    def fetched(self):
        if self._there is None:
            order.append("back")
        fetch(self)

    monkeypatch.setattr(Moved, "fetch", fetched)
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: order.append("feed-forward") or silu(x))
    loss.backward()
    # Of each block come back its input, out and log-sum-exp; of the last one nobody can know ahead.
    places = [place for place, what in enumerate(order) if what == "feed-forward"]
    assert [order[:place].count("back") for place in places] == [6, 9, 12, 12]


def test_without_room_in_host_memory_blocks_stay_where_they_are():
    model = recipe.build()
    model.keep(OFFLOAD, CPU, host_bytes=0)
    whole = recipe.build()
    for each in (model, whole):
        each(**shard_batch(recipe.batches(0)[1])).backward()
    assert model.memory.host.moved == 0
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_pages_of_a_pass_without_a_backward_pass_are_used_again():
    model = _own(OFFLOAD)
    for _ in range(3):
        loss = model(**shard_batch(recipe.batches(0)[1]))
        assert model.memory.host.used > 0
        del loss
        gc.collect()
        assert model.memory.host.used == 0


@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD, PAIRS])
def test_random_numbers_are_the_same_when_blocks_are_computed_again(policy):
    def run(policy):
        memory = BlockMemory(4)
        memory.start(policy, CPU)
        memory.begin()
        torch.manual_seed(3)
        first = x = torch.ones(1, 3, 4, requires_grad=True)
        for _ in range(4):
            x = memory.run(lambda x: (x * torch.rand_like(x)).sin(), x)
        memory.end()
        x.sum().backward()
        return first.grad, torch.rand(1)

    assert all(torch.equal(a, b) for a, b in zip(run(policy), run(KEEP), strict=True))


@pytest.mark.parametrize("policy", [RECOMPUTE, OFFLOAD])
def test_a_second_backward_pass_is_refused(policy):
    loss = _own(policy)(**shard_batch(recipe.batches(0)[1]))
    loss.backward(retain_graph=True)
    with pytest.raises(RingflashError, match=r"ran twice; engine\.memory=keep"):
        loss.backward()


def test_a_block_that_changes_its_input_in_place_is_refused():
    memory = BlockMemory(1)
    memory.start(RECOMPUTE, CPU)
    memory.begin()
    x, weight = torch.ones(1, 3, 4), torch.ones(4, requires_grad=True)
    result = memory.run(lambda x: x.mul_(2) * weight, x)
    with pytest.raises(RingflashError, match="in place"):
        result.sum().backward()


@pytest.mark.parametrize("elements", [1, 7, 5 * host_module.PAGE // 4 + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_comes_back_from_the_host_is_what_left(elements, dtype):
    memory = HostMemory(CPU, 2 * host_module.SLAB)
    tensors = [torch.randn(elements, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    moved = [memory.move(x) for x in tensors]
    assert memory.used == 3 * -(-tensors[0].nbytes // host_module.PAGE) * host_module.PAGE
    assert all(torch.equal(found.get(), x) for found, x in zip(reversed(moved), reversed(tensors), strict=True))
    assert memory.used == 0


def test_host_memory_stops_at_its_limit():
    memory = HostMemory(CPU, 3 * host_module.PAGE)
    held = [memory.move(torch.ones(1)) for _ in range(4)]
    assert [each is not None for each in held] == [True, True, True, False]
    del held[0]
    assert memory.move(torch.ones(1)) is not None


def test_each_process_of_a_machine_has_its_part_of_what_is_free(monkeypatch):
    assert 0 < available_bytes() < 1 << 50
    monkeypatch.setattr(available, "available_bytes", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert share_of_host() == 212


# Memory at once


def _peak_of(function, since=None):
    """Bytes in use at most while a function runs, beside what was there.

    Those behind the beginning of the last part that it names as `since`, if any.
    """
    gc.collect()  # what is released meanwhile would count, whoever allocated it
    gc.disable()
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
    finally:
        gc.enable()
    events = profile.profiler.kineto_results.events()
    begin = max((event.start_ns() for event in events if event.name() == since), default=0)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    sums = itertools.accumulate(size for _, size in changes)
    return max(size for size, (when, _) in zip(sums, changes, strict=True) if when >= begin)


def _peak(policy, tokens, blocks=2, width=16, feed_forward=4096, **options):
    model = recipe.build(model=ModelConfig(width, feed_forward, blocks, 1, 1, head_dim=16), **options)
    model.keep(policy, CPU)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    shard = shard_batch({"input_ids": ids, "cu_seqlens": range(0, tokens + 1, 256)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", 1 << 17)
        peak = _peak_of(lambda: model(**shard).backward())
    return peak, sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_wide_as_the_feed_forward_is_there_for_all_tokens(dtype):
    more = _peak(RECOMPUTE, 4096, dtype=dtype)[0] - _peak(RECOMPUTE, 1024, dtype=dtype)[0]
    wide = 3072 * 4096 * dtype.itemsize  # gate alone
    assert more < 0.35 * wide
    assert _peak(KEEP, 4096, dtype=dtype)[0] - _peak(KEEP, 1024, dtype=dtype)[0] > 4 * wide  # gate and up, of 2 blocks


def _growth_of_folder(path, policy):
    def peak(tokens):
        model = _of_folder(path, policy)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        shard = model.shard({"input_ids": ids, "cu_seqlens": range(0, tokens + 1, 256)})
        return _peak_of(lambda: model(**shard).backward())

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", 1 << 17)
        return peak(4096) - peak(1024)


def test_nor_is_it_in_layers_of_transformers_that_are_computed_again(pool, tmp_path):
    path = write_folder(tmp_path, intermediate_size=4096)
    wide = 3072 * 4096 * 4  # gate alone
    (found,), (whole,) = (pool(1).run(_growth_of_folder, path, each) for each in (OFFLOAD, KEEP))
    assert found < 0.35 * wide
    assert whole > 4 * wide


def test_moved_blocks_leave_nothing_on_the_device():
    tokens = 4096
    peaks = {
        policy: [_peak(policy, tokens, blocks, feed_forward=32) for blocks in (2, 10)]
        for policy in (RECOMPUTE, OFFLOAD)
    }
    weights = peaks[OFFLOAD][1][1] - peaks[OFFLOAD][0][1]
    kept = 8 * tokens * 4 * (16 + 16 + 1)
    assert peaks[RECOMPUTE][1][0] - peaks[RECOMPUTE][0][0] > kept
    assert peaks[OFFLOAD][1][0] - peaks[OFFLOAD][0][0] < 0.1 * kept + 2 * weights  # they and their gradients


def test_norms_and_rotations_upcast_one_tile_at_a_time(monkeypatch):
    monkeypatch.setitem(rows.TILE_ELEMENTS, "cpu", 1 << 14)
    x, weight = torch.randn(1, 4096, 1, 128).bfloat16().requires_grad_(), torch.ones(128, requires_grad=True)
    cos, sin = torch.randn(2, 1, 4096, 1, 64).unbind(0)
    for function in (lambda: rows.rms_norm(x, weight, 1e-5), lambda: rows.rotate(x, cos, sin)):
        # The result, its gradient, and that of x.
        assert _peak_of(lambda function=function: function().sum().backward()) < 3.5 * x.nbytes


# Rows in tiles


def _reference(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@given(tokens=st.integers(0, 40), tile=st.integers(1, 400), twice=st.booleans(), frozen=st.integers(0, 14))
def test_tiled_parts_have_the_values_and_gradients_of_whole_ones(tokens, tile, twice, frozen):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens, 6, dtype=torch.float64, generator=generator).requires_grad_(not frozen & 8)
    weights = [torch.randn(size, dtype=torch.float64, generator=generator) for size in ((9, 6), (9, 6), (6, 9))]
    for bit, weight in enumerate(weights):
        weight.requires_grad_(not frozen & 1 << bit)
    expected = _reference(x, *weights)
    memory = BlockMemory(1)
    memory.start(RECOMPUTE if twice else KEEP, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        found = memory.run(lambda x: rows.swiglu(x, *weights), x)
        torch.testing.assert_close(found, expected)
        wanted = [each for each in (x, *weights) if each.requires_grad]
        dout = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        gradients = torch.autograd.grad(found, wanted, dout, allow_unused=not tokens, materialize_grads=not tokens)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, wanted, dout), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-6)  # several tiles are summed in fp32


def test_what_somebody_does_with_a_weights_gradient_is_done_once_whatever_the_tiles():
    x, weight = torch.ones(1, 6, 4), torch.ones(4, 4, requires_grad=True)
    for factor in (1, 2):
        rows.tiled(lambda x: x @ weight.T, x, (weight,), 4, 6, 8).sum().backward()
        assert torch.equal(weight.grad, torch.full((4, 4), factor * 6.0))
        weight.grad = None
        weight.register_hook(lambda gradient: 2 * gradient)


@given(tokens=st.integers(1, 40), tile=st.integers(1, 400))
def test_tiled_norms_and_rotations_have_the_values_and_gradients_of_whole_ones(tokens, tile):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 2, 6, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(6, generator=generator).requires_grad_()
    cos, sin = torch.randn(2, 2, tokens, 1, 3, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        found = rows.rotate(rows.rms_norm(x, weight, 1e-5), cos, sin)
        first, second = torch.nn.functional.rms_norm(x.float(), (6,), weight, 1e-5).bfloat16().float().chunk(2, -1)
        expected = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).bfloat16()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        dout = torch.randn(expected.shape, generator=generator).bfloat16()
        gradients = torch.autograd.grad(found, (x, weight), dout)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, (x, weight), dout), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_gradients_of_weights_in_bf16_are_summed_in_fp32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((512, 32), (48, 32), (48, 32), (32, 48))
    )
    exact = [each.double().requires_grad_() for each in (x, *weights)]
    expected = torch.autograd.grad(_reference(*exact).sum(), exact)
    errors = []
    for tile in (512 * 48, 16 * 48):
        monkeypatch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        inputs = [each.clone().requires_grad_() for each in (x, *weights)]
        found = torch.autograd.grad(rows.swiglu(inputs[0][None], *inputs[1:]).sum(), inputs)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)])
    assert all(many <= 1.6 * one for one, many in zip(*errors, strict=True))


# Who decides


@given(
    blocks=st.integers(1, 90),
    moved=st.floats(0, 1),
    kept=st.integers(1, 100),
    again=st.integers(1, 1000),
    free=st.integers(-1000, 10**5),
)
def test_blocks_are_placed_as_memory_allows(blocks, moved, kept, again, free):
    measured = Measured(free, math.floor(moved * blocks), kept, again)
    found = placed(blocks, measured)
    assert len(found) == blocks
    assert found == sorted(found, key=[OFFLOAD, RECOMPUTE, KEEP].index)  # the first ones move, the last ones are whole
    stay = measured.moved - found.count(OFFLOAD)
    taken = stay * kept + found.count(KEEP) * again
    assert stay >= 0
    assert taken <= max(0, free)
    if found.count(OFFLOAD):
        assert taken + kept > free  # not one more has room
        assert KEEP not in found
    elif found.count(KEEP) < blocks:
        assert taken + again > free
    assert said(found, False, measured).startswith(f"of {blocks} blocks ")


class _Gpu:
    """What torch says of a GPU's memory, of which a step takes 1,000 bytes beside what blocks keep, and leaves 100."""

    def __init__(self, patch, size):
        self.allocated = 500
        for name, value in {
            "mem_get_info": lambda _: (size - 2000, size),
            "memory_reserved": lambda _: 2000,
            "memory_allocated": lambda _=None: self.allocated,
            "max_memory_allocated": lambda _: 1500,
            "reset_peak_memory_stats": lambda _: None,
        }.items():
            patch.setattr(torch.cuda, name, value)


def _decide(sizes, blocks, tokens=(5, 5)):
    size, tokens = (each[dist.get_rank()] for each in (sizes, tokens))
    memory = BlockMemory(blocks)
    with pytest.MonkeyPatch.context() as patch:
        gpu = _Gpu(patch, size)
        patch.setattr(host_module, "PAGE", 100)
        patch.setattr(host_module, "SLAB", 100)
        memory.host = HostMemory(CPU, 64 * host_module.PAGE)
        memory._first_step = FirstStep(CPU, blocks, memory.host.limit)
        memory.begin_step()
        for _ in range(2):  # micro-batches
            memory.begin()
            x = torch.ones(1, tokens, 5, requires_grad=True)
            for _ in range(blocks):
                x = memory.run(torch.sin, x)
            memory.end()
            x.sum().backward()
        moved, taken, gpu.allocated = memory.host.moved, memory.host.taken, 600
        memory.end_step()
    assert 2 * taken == moved  # the host was asked for what a micro-batch moves, and not for more
    return moved // 200, memory.placements, memory.decision


@pytest.mark.parametrize("least", [1500, 1900, 2100, 10**4])
def test_ranks_decide_by_the_first_step_on_the_rank_with_the_least_memory(pool, least):
    blocks, kept = 8, 100  # bytes of an input of 25 numbers
    (moved, placements, decision), other = pool(2).run(_decide, [10**5, least], blocks)
    assert (placements, decision) == other[1:]
    assert moved == 0  # a tenth of what is free has room for all
    room = int(0.1 * (least - 500))
    assert other[0] == blocks - max(1, room // kept) if room < blocks * kept else other[0] == 0
    free = max(0, int(0.95 * least) - 1500 - 100)
    assert placements == placed(blocks, Measured(free, other[0], kept, 0))


def test_a_rank_without_tokens_decides_as_the_others_do(pool):
    (_, placements, decision), other = pool(2).run(_decide, [10**5, 1500], 8, (0, 5))
    assert (placements, decision) == other[1:]


def test_on_cpus_auto_keeps_everything():
    memory = _own("auto").memory
    assert memory.placements == [KEEP] * 2
    assert memory.decision == "of 2 blocks 2 kept whole"


def test_the_old_key_is_refused_with_the_name_of_the_new_one():
    with pytest.raises(ArgumentError, match=r"engine\.activation_checkpointing .* engine\.memory=recompute"):
        load(["engine.activation_checkpointing=true"])
