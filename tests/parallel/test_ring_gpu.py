"""The ring on GPUs, against float64 and one GPU: one rank for each of this machine's GPUs, or two on its only one.

Ranks that share a GPU take turns on it, and copies between them are not by copy engines; what is asked for, and what
waits for what, is the same as among several.

python -m pytest -m gpu tests/parallel
"""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from cases import PARTITIONS, RESULTS, Shape, assert_as_exact_as_torch, exact, masks
from pool import Pool
from ring import Problem, attend_share, joined, one_device

from ringflash import (
    ArgumentError,
    DistributedFlashAttention,
    Mask,
    RankMismatchError,
    Sharding,
    flash_attn_varlen_func,
    shard,
    unshard,
)
from ringflash.functional import attention
from ringflash.kernels.gpu.recording import Repeated
from ringflash.kernels.kept import Kept
from ringflash.kernels.select import select
from ringflash.parallel.agreement.rounds import MOST_AHEAD
from ringflash.parallel.execution.known_calls import UNNOTED
from ringflash.parallel.lookup import shardings
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.planning import choose, choose_heads, heads
from ringflash.parallel.transport.select import transport_of
from ringflash.ring_flash_attn import zigzag_ring_flash_attn_varlen_func

pytestmark = pytest.mark.gpu

LENGTH = 1531
"""Prime: shares end within tiles, on every rank elsewhere."""

SHAPE = Shape(length=LENGTH, heads=8, key_heads=2, head_dim=128)


ON_ONE_GPU = 2
"""Ranks that share the only one."""


def _ranks_on_gpus():
    found = torch.cuda.device_count()
    if not found:
        pytest.skip("needs a GPU")
    if found == 1:  # which NCCL refuses to take for two
        return Pool(ON_ONE_GPU, timeout=240.0, one_gpu=True)
    return Pool(found, timeout=240.0, backend="cpu:gloo,cuda:nccl")


@pytest.fixture(scope="module")
def gpus():
    with _ranks_on_gpus() as pool:
        yield pool


@pytest.fixture
def own_gpus():
    """For a test after which no further call of the group can be matched."""
    with _ranks_on_gpus() as pool:
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


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", ["causal", "documents-causal", "window-sink"])
def test_gpus_that_exchange_heads_equal_one_gpu(gpus, name, partition):
    for head_ranks in (n for n in (2, 4, 8) if gpus.size % n == 0):
        problem = Problem(masks(LENGTH)[name], SHAPE, partition, torch.bfloat16, head_ranks=head_ranks)
        assert_ring_is_exact(gpus, problem)


def _attend_with_level_queries(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "CLEARLY", 1e9)  # queries cross wherever they could
        patch.setattr(choose, "_choices", Kept(2**20, size=lambda _: 1))
        shardings.clear()
        found = _attend(problem)
        assert any(x._placement.exchange(0, torch.device("cuda", 0)) for x in shardings._found.values())
    shardings.clear()
    return found


@pytest.mark.parametrize("name", ["causal", "documents-causal", "window-sink"])
def test_queries_that_cross_to_other_gpus_equal_one_gpu(gpus, name):
    problem = Problem(masks(LENGTH)[name], SHAPE, "contiguous", torch.bfloat16)
    results = joined(problem, gpus.run(_attend_with_level_queries, problem))
    results = {name: x.cuda() for name, x in results.items()}
    assert_as_exact_as_torch(results, [x.cuda() for x in problem.inputs()], problem.seen.cuda(), problem.scale)


def _attend_in_groups(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "ROOM", 1)
        patch.setattr(heads, "LONG", 0)
        shardings.clear()
        found = _attend(problem)
        assert any(x._placement.rows_in_groups(0) for x in shardings._found.values())
    shardings.clear()
    return found


@pytest.mark.parametrize("head_ranks", [1, 2])
@pytest.mark.parametrize("name", ["causal", "documents-causal", "window-sink"])
def test_heads_in_groups_on_several_gpus_equal_one_gpu(gpus, name, head_ranks):
    problem = Problem(masks(LENGTH)[name], SHAPE, "zigzag", torch.bfloat16, head_ranks=head_ranks)
    results = {name: x.cuda() for name, x in joined(problem, gpus.run(_attend_in_groups, problem)).items()}
    assert_as_exact_as_torch(results, [x.cuda() for x in problem.inputs()], problem.seen.cuda(), problem.scale)


def _attend_unasked(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_heads, "AT_ALL", 1e9)  # heads are exchanged wherever they could be
        patch.setattr(choose_heads, "LEAST", 0.0)
        shardings.clear()
        found = _attend(problem)
        assert any(x._placement._of_heads for x in shardings._found.values())
    shardings.clear()
    return found


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", ["causal", "documents-causal", "window-sink"])
def test_gpus_that_exchange_heads_unasked_equal_one_gpu(gpus, name, partition):
    problem = Problem(masks(LENGTH)[name], SHAPE, partition, torch.bfloat16, head_ranks=None)
    results = {name: x.cuda() for name, x in joined(problem, gpus.run(_attend_unasked, problem)).items()}
    assert_as_exact_as_torch(results, [x.cuda() for x in problem.inputs()], problem.seen.cuda(), problem.scale)


def _kept_pairs(head_ranks):
    """As on CPUs (tests/parallel/test_heads.py): each number of out shows the fate of one pair."""
    length, heads = 64, 16
    sharding = Sharding(Mask.causal(), seqlen=length, head_ranks=head_ranks)
    query = torch.zeros(1, length, heads, 64, device="cuda")
    value = torch.eye(length, device="cuda")[None, :, None].expand(1, length, heads, length)
    mine = [sharding.shard(x, 1) for x in (query, query, value)]
    out, _ = attention(*mine, sharding=sharding, dropout=0.5, dropout_seed=torch.tensor([17], device="cuda"))
    return (sharding.unshard(out, 1) != 0).cpu()


def test_gpus_that_exchange_heads_drop_the_pairs_that_a_ring_drops(gpus):
    ring, *_ = gpus.run(_kept_pairs, 1)
    for kept in gpus.run(_kept_pairs, gpus.size):
        assert torch.equal(kept, ring)


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
    sharded = {"partition": partition, "mask": Mask.causal()}
    x = torch.arange(3 * 17.0, device="cuda").view(3, 17).requires_grad_()
    whole = unshard(shard(x, 1, **sharded), 1, **sharded)
    assert torch.equal(whole, x)
    whole.sum().backward()
    held = shard(torch.arange(17, device="cuda"), 0, **sharded)
    assert (x.grad[:, held] == dist.get_world_size()).all()
    assert x.grad.sum() == 3 * len(held) * dist.get_world_size()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_shard_and_unshard(gpus, partition):
    gpus.run(_round_trip, partition)


# What the host finds out about ranks without waiting for them


LATE = 0.3
"""Seconds in which other ranks go on as far as they can."""


def _errors_of_steps(before, late, calls=6):
    """A loop over new numbers, with something that rank 0 alone does before one of its steps; the largest error."""
    attend, errors = DistributedFlashAttention(), []
    random = torch.Generator().manual_seed(0)
    for step in range(calls):
        if step == before and (dist.get_rank() == 0) is late:
            time.sleep(LATE)
        if step == before and dist.get_rank() == 0:
            with pytest.raises(ArgumentError):
                DistributedFlashAttention(kernel="triton")(*[torch.randn(1, 8, 2, 16, device="cuda").double()] * 3)
        x = torch.randn(1, 512, 2, 64, generator=random).to("cuda", torch.bfloat16)
        expected, _ = attention(x, x, x, group=ONE_DEVICE)
        leaf = shard(x, 1).requires_grad_()
        out = attend(leaf, leaf, leaf)
        out.sum().backward()
        errors.append((out - shard(expected, 1)).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("before", [0, 3])
def test_a_call_that_one_gpu_tries_alone_disturbs_nobody(gpus, before, late):
    assert max(gpus.run(_errors_of_steps, before, late)) < 0.05


def _known_calls_then_apart():
    x = torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16)
    for scale in (0.25, 0.5, 0.25, 0.5):
        attention(x, x, x, scale=scale)

    def go_apart():
        attention(x, x, x, scale=0.5 if dist.get_rank() == 1 else 0.25)
        for _ in range(MOST_AHEAD):
            attention(x, x, x, scale=0.25)

    with pytest.raises(RankMismatchError) as raised:
        go_apart()
    torch.cuda.synchronize()
    return str(raised.value)


def test_a_gpu_that_goes_alone_between_known_calls_is_named_some_calls_later(own_gpus):
    for said in own_gpus.run(_known_calls_then_apart):
        assert "ranks disagree on scale: 0.25 on rank 0" in said
        assert "0.5 on rank 1" in said


class OutOfMemoryError(Exception):
    """Stands in for torch's."""


def _out_of_memory(name):
    x = torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kernels = select(x.device, x.dtype, 64)

    def step():
        attention(x, x, x)[0].sum().backward()

    def failing(*arguments, **settings):
        time.sleep(LATE)
        raise OutOfMemoryError("tried to allocate 20 GiB")

    def steps():
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(kernels, name, failing)
            step()
        for _ in range(MOST_AHEAD):
            step()

    step()
    with pytest.raises((OutOfMemoryError, RankMismatchError)) as raised:
        steps()
    return str(raised.value)


@pytest.mark.parametrize("name", ["attend", "attend_backward"])
def test_an_error_inside_a_kernel_of_one_gpu_is_heard_by_the_others_some_calls_later(own_gpus, name):
    outcomes = own_gpus.run(_out_of_memory, name)
    assert outcomes[1] == "tried to allocate 20 GiB"
    assert "rank 1 raised an error" in outcomes[0]
    assert "OutOfMemoryError: tried to allocate 20 GiB" in outcomes[0]


def _repeated():
    """How many calls went by a list, the largest error beside one GPU, and whether calls gave what they gave before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sharding = Sharding(Mask.causal(), seqlen=1024 * ranks, rank=rank, ranks=ranks, head_ranks=1)
    random = torch.Generator().manual_seed(0)
    steps = [
        [torch.randn(1, 1024 * ranks, 4, 64, generator=random).to("cuda", torch.bfloat16) for _ in range(4)]
        for _ in range(3)
    ]

    def step(q, k, v, dout, **settings):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = attention(*leaves, deterministic=True, **settings)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    attention(*[torch.zeros(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)] * 3)  # a group's first call is not known
    ran, original, found = [], Repeated.run, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repeated, "run", lambda *arguments: ran.append(None) or original(*arguments))
        for _ in range(4):
            found += [step(*[sharding.shard(x, 1) for x in tensors], sharding=sharding) for tensors in steps]
    error = 0.0
    for number, tensors in enumerate(steps):
        alone = step(*tensors, group=ONE_DEVICE)
        for got, x in zip(found[-3 + number], alone, strict=True):
            error = max(error, (got - sharding.shard(x, 1)).abs().max().item())
    alike = all(torch.equal(x, y) for i in range(9) for x, y in zip(found[i], found[i + 3], strict=True))
    return len(ran), error, alike


def test_calls_by_a_list_give_bit_for_bit_what_calls_give_that_find_their_way(gpus):
    for ran, error, alike in gpus.run(_repeated):
        assert ran == 2 * (12 - UNNOTED - 2)
        assert error < 0.1
        assert alike


def _sharding_made_ahead(head_ranks):
    """Made by a thread, pickled between, over the ranks; nothing waits for the host in a repeated call."""
    place = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "head_ranks": head_ranks}
    sharding = pickle.loads(pickle.dumps(Sharding(Mask.causal(), cu_seqlens=[0, 300, 1531], **place)))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(sharding.prepare, torch.device("cuda", torch.cuda.current_device())).result()
    x = torch.randn(1, 1531, 4, 64, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    mine = sharding.shard(x, 1)
    attention(mine, mine, mine, sharding=sharding)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = attention(mine, mine, mine, sharding=sharding)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, _ = attention(x, x, x, mask=Mask.causal(), cu_seqlens=[0, 300, 1531], group=ONE_DEVICE)
    return (sharding.unshard(out, 1) - expected).abs().max().item()


@pytest.mark.parametrize("head_ranks", [1, 2])
def test_a_sharding_is_made_ahead_and_repeated_calls_never_wait_for_the_device(gpus, head_ranks):
    assert max(gpus.run(_sharding_made_ahead, head_ranks)) < 0.05


def _boundaries_on_the_gpu():
    """ring-flash-attn's function with `cu_seqlens` where its users have them; the host reads them in the first call."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = [128 * ranks, 512 * ranks, 64 * ranks]
    x = torch.randn(sum(lengths), 4, 64, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    expected = flash_attn_varlen_func(x, x, x, edges, edges, max(lengths), max(lengths), causal=True)

    def on_this_rank(whole):
        pieces = [part.chunk(2 * ranks) for part in whole.split(lengths)]
        return torch.cat([torch.cat([piece[rank], piece[2 * ranks - 1 - rank]]) for piece in pieces])

    mine, own = on_this_rank(x), edges // ranks
    zigzag_ring_flash_attn_varlen_func(mine, mine, mine, own, 512, causal=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = zigzag_ring_flash_attn_varlen_func(mine, mine, mine, own, 512, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return (out - on_this_rank(expected)).abs().max().item()


def test_boundaries_on_the_gpu_are_read_once_and_layers_after_the_first_never_wait(gpus):
    assert max(gpus.run(_boundaries_on_the_gpu)) < 0.05


# Transports


def _why():
    attention(*_inputs(256), mask=Mask.causal())
    return transport_of(dist.group.WORLD).why


def _inputs(tokens, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    shape = 1, tokens, SHAPE.heads, SHAPE.head_dim
    return [torch.randn(shape, device="cuda", dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


def test_gpus_of_one_host_have_copy_engines(gpus):
    assert all(why.startswith("symmetric_memory") for why in gpus.run(_why))


def _exchange(sizes, rounds):
    """What each rank gets wrong of messages to all others, of which the largest fill mailboxes several times."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    transport, wrong = transport_of(dist.group.WORLD), []
    transport.open(torch.device("cuda", torch.cuda.current_device()))
    for number in range(rounds):
        size = sizes[number % len(sizes)]
        mine = torch.arange(size, device="cuda", dtype=torch.int32).mul_(2 * number + 1).add_(rank)
        found = {peer: torch.empty_like(mine) for peer in range(ranks) if peer != rank}
        others = [peer for peer in found if (peer + number) % 3 or size < 1000]  # at times some only
        writers = [peer for peer in found if (rank + number) % 3 or size < 1000]
        ticket = transport.transfer(
            [(peer, mine[: size // 2]) for peer in others] + [(peer, mine[size // 2 :]) for peer in others],
            [(peer, found[peer][: size // 2]) for peer in writers]
            + [(peer, found[peer][size // 2 :]) for peer in writers],
            "numbers",
        )
        mine = torch.zeros(1, device="cuda")  # the ticket holds what is sent
        ticket.wait()
        for peer in writers:
            expected = torch.arange(size, device="cuda", dtype=torch.int32).mul_(2 * number + 1).add_(peer)
            if not torch.equal(found[peer], expected):
                wrong.append((number, peer, size))
    return wrong


def test_messages_of_any_size_arrive(gpus):
    assert gpus.run(_exchange, (2, 100, 5_000_000, 7_777, 30_000_001, 64), 120) == [[]] * gpus.size


def _results(tokens):
    query, key, value = _inputs(tokens)
    out, lse = attention(query, key, value, mask=Mask.causal(), deterministic=True)
    gradients = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    return [x.detach().cpu() for x in (out, lse, *gradients)]


def _results_by_send_and_receive(tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGFLASH_TRANSPORT", "send_recv")
        found = _results(tokens)
    assert transport_of(dist.group.WORLD).why == "send_recv: rank 0: RINGFLASH_TRANSPORT=send_recv"
    return found


def test_transports_give_the_same_bits(gpus, own_gpus):
    if own_gpus.one_gpu:
        pytest.skip("needs two GPUs")
    for ours, theirs in zip(gpus.run(_results, 9_001), own_gpus.run(_results_by_send_and_receive, 9_001), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
