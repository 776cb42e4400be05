"""Ranks that disagree, die or stall: every rank gets an error that says who and what, and nothing hangs.

Each test starts processes of its own, because they end in a state that no other test should meet.
"""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from ringflash import (
    ArgumentError,
    DistributedFlashAttention,
    Mask,
    Partition,
    RankMismatchError,
    UnsupportedError,
    shard,
    unshard,
)
from ringflash.functional import attention
from ringflash.kernels.cpu import blockwise
from ringflash.kernels.torch_private import default_store
from ringflash.parallel import placement
from ringflash.parallel.agreement.meetings import REFUSED_UNKNOWN
from ringflash.parallel.agreement.rounds import agreement
from ringflash.parallel.execution import call, gradients
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.transport import head_exchange
from ringflash.parallel.transport.select import GroupTransport
from ringflash.ring_flash_attn import (
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_func,
    ring_flash_attn_func,
    ring_flash_attn_qkvpacked_func,
    ring_flash_attn_varlen_func,
)

PROMPT = 10.0
"""Seconds within which a disagreement must be an error on every rank."""


def _attend(odd_rank, differs):
    """Forward and backward in which one rank has other arguments than the rest."""
    arguments = {"dtype": torch.float32, "heads": 6, "key_heads": 2, "head_dim": 16, "batch": 1, "rows": 6}
    arguments |= {"mask": Mask.causal(), "partition": "contiguous", "scale": None, "cu_seqlens": None, "sinks": None}
    arguments |= {"head_ranks": 1}
    if dist.get_rank() == odd_rank:
        assert set(differs) <= set(arguments)
        arguments |= differs
    heads = (arguments["heads"], arguments["key_heads"], arguments["key_heads"])
    query, key, value = (
        torch.randn(arguments["batch"], arguments["rows"], count, arguments["head_dim"], dtype=arguments["dtype"])
        for count in heads
    )
    names = ("mask", "partition", "scale", "head_ranks")
    attend = DistributedFlashAttention(**{name: arguments[name] for name in names})
    attend(
        query.requires_grad_(), key, value, cu_seqlens=arguments["cu_seqlens"], sinks=arguments["sinks"]
    ).sum().backward()


DISAGREEMENTS = {
    "dtype": ({"dtype": torch.float16}, ("dtype", "float32", "float16")),
    "heads": ({"heads": 8}, ("heads", "6", "8")),
    "key heads": ({"key_heads": 3}, ("heads", "2", "3")),
    "head dimension": ({"head_dim": 32}, ("head_dim", "16", "32")),
    "tokens": ({"rows": 7}, ("seqlen", "18", "21")),
    "batch": ({"batch": 2}, ("batch", "1", "2")),
    "mask": ({"mask": Mask.sliding_window(3)}, ("mask", "right", "left")),
    "documents": ({"cu_seqlens": [0, 5, 18]}, ("cu_seqlens",)),
    "documents of the mask": ({"mask": Mask.causal() & Mask.documents([0, 5, 18])}, ("cu_seqlens",)),
    "partition": ({"partition": "zigzag"}, ("partition", "contiguous", "zigzag")),
    "head ranks": ({"head_ranks": 3}, ("head_ranks", "1", "3")),
    "scale": ({"scale": 0.5}, ("scale", "0.25", "0.5")),
    "sinks": ({"sinks": torch.ones(6)}, ("sinks given", "false", "true")),
}


@pytest.mark.parametrize("odd_rank", [0, 2])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_disagreement_names_ranks_and_values_on_every_rank(what, odd_rank):
    differs, words = DISAGREEMENTS[what]
    with Pool(3, timeout=PROMPT) as pool:
        outcomes = pool.outcomes(_attend, odd_rank, differs)
    for outcome in outcomes:
        assert isinstance(outcome.error, RankMismatchError), outcome.details or "no error"
        message = str(outcome.error)
        assert all(word in message for word in words), message
        assert f"on rank {odd_rank}" in message
        assert outcome.seconds < PROMPT


def test_a_disagreement_after_calls_that_agreed_is_found_too():
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_attend_then_change):
            assert isinstance(outcome.error, RankMismatchError), outcome.details or "no error"
            assert "18 on rank 0; 20 on rank 1" in str(outcome.error)


def _attend_then_change():
    attend = DistributedFlashAttention(Mask.causal())
    for rows in (6, 8, 9 + dist.get_rank()):
        x = torch.randn(1, rows, 2, 16)
        attend(x, x, x)


REFUSED = {
    "scale": ({"scale": -1.0}, "scale=-1.0"),
    "key heads": ({"key_heads": 4}, "query has 6 heads, key 4"),
    "head ranks": ({"head_ranks": 2}, "head_ranks=2; allowed are numbers that divide the 3 ranks"),
    "heads": ({"head_ranks": 3, "heads": 4}, "query has 4 heads, head_ranks=3; the first must be a multiple"),
    "documents": ({"cu_seqlens": [0, 5, 19]}, "cu_seqlens ends at 19"),
    "partition": ({"partition": Partition.zigzag(18, 2)}, "to 2 ranks; needed are 18 positions and 3 ranks"),
}


def _attend_refused_once(differs):
    try:
        _attend(1, differs)
    except (ArgumentError, RankMismatchError) as error:
        said = error
    _attend(1, {})  # ranks are still in step
    return said


@pytest.mark.parametrize("what", REFUSED)
def test_an_error_of_one_rank_reaches_those_that_would_wait_for_it(what):
    differs, words = REFUSED[what]
    with Pool(3, timeout=PROMPT) as pool:
        first, odd, last = pool.run(_attend_refused_once, differs)
    assert isinstance(odd, ArgumentError)
    for told in (first, last):
        assert isinstance(told, RankMismatchError)
        assert f"rank 1 raised an error instead of coming to attention: ArgumentError: {odd}" in str(told)
        assert words in str(told)


def _flash(wrong, compiled):
    """ring-flash-attn's function; arguments that rank 1 alone has replace the right ones."""
    x = torch.randn(1, 6, 2, 8)
    arguments = {"q": x, "k": x, "v": x} | (wrong if dist.get_rank() == 1 else {})
    torch.compiler.reset()
    function = ring_flash_attn_func if compiled is None else _compiled(ring_flash_attn_func, compiled)
    return function(**arguments)


def _packed(wrong, compiled):
    x = torch.randn(6, 2, 8)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens": torch.tensor([0, 2, 6]), "max_seqlen": 4}
    arguments |= wrong if dist.get_rank() == 1 else {}
    torch.compiler.reset()
    function = ring_flash_attn_varlen_func if compiled is None else _compiled(ring_flash_attn_varlen_func, compiled)
    return function(**arguments)


def _packed_together(wrong, compiled):
    return ring_flash_attn_qkvpacked_func(torch.randn(1, 6, 2 if dist.get_rank() == 1 else 3, 2, 8))


def _llama3(wrong, compiled):
    x = torch.randn(6, 2, 8)
    prepared = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 4, 12]), True, dist.get_rank(), 2)
    arguments = {"heads_k_stride": 1, "local_k_slice": prepared[4], "causal": True}
    arguments |= wrong if dist.get_rank() == 1 else {}
    return llama3_flash_attn_varlen_func(x, x, x, *prepared[:4], **arguments)


def _compiled(function, fullgraph):
    return torch.compile(function, backend="eager", fullgraph=fullgraph)


def _refused_once(function, wrong, compiled):
    try:
        function(wrong, compiled)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    function({}, None) if function is not _packed_together else _attend(1, {})  # ranks are still in step
    return said


@pytest.mark.parametrize(
    ("function", "wrong", "words"),
    [
        (_flash, {"window_size": (-3, 0)}, "window_size=(-3, 0)"),
        (_flash, {"q": torch.zeros(6, 2, 8)}, "q has shape (6, 2, 8)"),
        (_flash, {"dropout_p": "5"}, "dropout_p='5'"),
        (_packed, {"max_seqlen": 3}, "max_seqlen=3; the longest sequence has 4"),
        (_packed, {"dropout_p": 2.0}, "dropout_p=2.0"),
        (_packed_together, {}, "qkv has shape (1, 6, 2, 2, 8)"),
        (_llama3, {"local_k_slice": slice(0, 6)}, "local_k_slice=slice(0, 6, None)"),
    ],
    ids=["window", "shape", "type", "longest", "dropout", "packed", "slice"],
)
def test_an_error_in_the_arguments_of_ring_flash_attns_functions_reaches_the_others(function, wrong, words):
    with Pool(2, timeout=PROMPT) as pool:
        first, second = pool.run(_refused_once, function, wrong, None)
    assert words in second
    assert first.startswith("RankMismatchError: rank 1 raised an error instead of coming to attention: ")
    assert words in first


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("function", "wrong", "words"),
    [
        (_flash, {"window_size": (-3, 0)}, "window_size=(-3, 0)"),
        (_packed, {"dropout_p": 2.0}, "dropout_p=2.0"),
    ],
    ids=["window", "dropout"],
)
def test_an_error_in_the_arguments_of_compiled_attention_reaches_the_others(function, wrong, words, fullgraph):
    with Pool(2, timeout=30.0, group_timeout=20.0) as pool:
        first, second = pool.run(_refused_once, function, wrong, fullgraph)
    assert words in second if not fullgraph else "Unsupported" in second  # torch's word for a trace that fails
    assert first.startswith("RankMismatchError: rank 1 raised an error instead of coming to attention: ArgumentError")
    assert words in first


def _attend_without_kernels():
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(call, "select", _nothing_there)
        with pytest.raises((ArgumentError, RankMismatchError)) as raised:
            _attend(1, {})
    _attend(1, {})  # ranks are still in step
    return str(raised.value)


def _nothing_there(*problem):
    raise ArgumentError("kernel='triton' cannot run: the package triton is not installed")


def test_a_kernel_that_one_machine_lacks_is_an_error_on_all():
    with Pool(2, timeout=PROMPT) as pool:
        first, second = pool.run(_attend_without_kernels)
    assert second.endswith("the package triton is not installed")
    assert first == f"rank 1 raised an error instead of coming to attention: ArgumentError: {second}"


def _attend_under_vmap_on_one_rank():
    x = torch.randn(2, 1, 6, 2, 16)
    if dist.get_rank() == 0:
        torch.vmap(lambda x: attention(x, x, x)[0])(x)
    else:
        attention(x[0], x[0], x[0])


def test_vmap_on_one_rank_is_heard_by_the_others():
    with Pool(2, timeout=PROMPT) as pool:
        first, second = pool.outcomes(_attend_under_vmap_on_one_rank)
    assert isinstance(first.error, UnsupportedError), first.details
    assert isinstance(second.error, RankMismatchError), second.details
    assert "rank 0 raised an error instead of coming to attention: UnsupportedError" in str(second.error)


def _wrong_share(rows_of_rank):
    x = torch.randn(1, rows_of_rank[dist.get_rank()], 2, 16)
    DistributedFlashAttention(Mask.causal(), partition="contiguous")(x, x, x, seqlen=11)


def test_one_rank_with_a_wrong_share_of_an_uneven_length_is_an_error_on_every_rank():
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_wrong_share, (5, 7)):
            assert isinstance(outcome.error, RankMismatchError | ArgumentError), outcome.details or "no error"
            assert "rank 1" in str(outcome.error)
        for outcome in pool.outcomes(_wrong_share, (6, 7)):
            assert isinstance(outcome.error, RankMismatchError | ArgumentError), outcome.details or "no error"


def _unshard_differently(differs):
    odd = dist.get_rank() == 1
    x = torch.zeros(2, 5 + (odd and differs == "rows"), 3 + (odd and differs == "width"))
    x = x.half() if odd and differs == "dtype" else x
    unshard(x, 1, partition="zigzag" if odd and differs == "partition" else "contiguous", seqlen=10)


@pytest.mark.parametrize("differs", ["rows", "width", "dtype", "partition"])
def test_unshard_of_different_shares_is_an_error_on_every_rank(differs):
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_unshard_differently, differs):
            assert isinstance(outcome.error, RankMismatchError | ArgumentError), outcome.details or "no error"
            assert "rank 1" in str(outcome.error)


def _unshard_with_and_without_seqlen():
    unshard(torch.zeros(2, 5), 1, seqlen=10 if dist.get_rank() == 1 else None)


def test_unshard_told_the_length_on_some_ranks_only_is_an_error_on_every_rank():
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_unshard_with_and_without_seqlen):
            assert isinstance(outcome.error, RankMismatchError), outcome.details or "no error"
            assert "seqlen: null on rank 0; 10 on rank 1" in str(outcome.error)


def _unshard_wrongly_on_one_rank():
    x, odd = torch.full((1, 3), float(dist.get_rank())), dist.get_rank() == 1
    whole = [unshard(x, 1, partition="contiguous")]
    with pytest.raises(IndexError if odd else RankMismatchError):
        unshard(x, 7 if odd else 1, partition="contiguous")
    return [*whole, unshard(x + 2, 1, partition="contiguous")]


def test_an_unshard_that_one_rank_refuses_is_refused_once_and_shifts_no_rank():
    with Pool(2, timeout=PROMPT) as pool:
        for first, second in pool.run(_unshard_wrongly_on_one_rank):
            assert first.tolist() == [[0, 0, 0, 1, 1, 1]]
            assert second.tolist() == [[2, 2, 2, 3, 3, 3]]


def _unshard_where_no_call_can_be_matched(seqlen):
    """How often streams that wait for others are let go."""
    x, gone = torch.zeros(1, 3), []
    unshard(x, 1, seqlen=6)
    agreement(dist.group.WORLD).close(MemoryError("of a launch"), torch.device("cuda", 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupTransport, "abandon", lambda transport: gone.append(transport))
        with pytest.raises(RankMismatchError, match="MemoryError: of a launch"):
            unshard(x, 1, seqlen=seqlen)
    return len(gone)


@pytest.mark.parametrize("seqlen", [None, 6])
def test_who_hears_in_an_unshard_that_no_call_can_be_matched_waits_for_none(seqlen):
    with Pool(2, timeout=PROMPT) as pool:
        assert pool.run(_unshard_where_no_call_can_be_matched, seqlen) == [1, 1]


def _after_an_earlier_life():
    """What a rank of an earlier group of this name refused still stands in the store."""
    x = torch.randn(1, 6, 2, 16)
    before = f"ringflash/before/{dist.group.WORLD.group_name}"
    default_store().set(f"{before}/early", "")
    default_store().set(f"{before}/early/0", json.dumps([7, [[REFUSED_UNKNOWN, 0, "ArgumentError: scale=-1.0"]]]))
    default_store().set(f"{before}/identity", json.dumps([7, 1234]))
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(1.0)  # the other rank listens meanwhile
    attention(x, x, x)


def test_what_an_earlier_group_of_the_same_name_left_behind_is_not_heard():
    with Pool(2, timeout=PROMPT) as pool:
        pool.run(_after_an_earlier_life)


def _steps(before, calls=5):
    """A loop over new numbers, with something that rank 0 alone does before one of its steps; the largest error."""
    attend, errors = DistributedFlashAttention(), []
    random = torch.Generator().manual_seed(0)
    for step in range(calls):
        if step == before and dist.get_rank() == 0:
            with pytest.raises(ArgumentError):
                DistributedFlashAttention(kernel="hopper")(*[torch.randn(1, 8, 2, 16)] * 3)
        x = torch.randn(1, 60, 2, 16, generator=random)
        expected, _ = attention(x, x, x, group=ONE_DEVICE)
        leaf = shard(x, 1).requires_grad_()
        out = attend(leaf, leaf, leaf)
        out.sum().backward()
        errors.append((out - shard(expected, 1)).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("before", [0, 3])
def test_a_call_that_one_rank_tries_alone_disturbs_nobody_and_shifts_no_rank(before, ranks):
    with Pool(ranks, timeout=2 * PROMPT) as pool:
        assert max(pool.run(_steps, before)) < 1e-5


def _refused_before_a_collective_of_ones_own():
    """Rank 0 refuses its first call, catches that, and reduces something with the others, who came to the call."""
    x = torch.randn(1, 6, 2, 16)
    with pytest.raises((ArgumentError, RankMismatchError)):
        attention(x, x, x, softcap=-1.0 if dist.get_rank() == 0 else 0.0)
    loss = torch.tensor([1.0 + dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(loss)
    attention(x, x, x)  # ranks are still in step
    return loss.item()


def test_a_refused_first_call_does_not_run_into_the_groups_own_collectives():
    with Pool(2, timeout=2 * PROMPT) as pool:
        assert pool.run(_refused_before_a_collective_of_ones_own) == [3.0, 3.0]


NEEDED_BEFORE = {
    "program": (placement, "rank_program"),
    "delta": (blockwise, "row_delta"),
    "buffers": (gradients.KeyGradients, "__init__"),
    "what crosses": (head_exchange.Outward, "__init__"),
    "what comes back": (head_exchange.Returning, "__init__"),
}


def _out_of_memory_before_the_call(where, head_ranks):
    """Rank 1 cannot make what a call needs; says what was raised, and the error of the next step."""
    random = torch.Generator().manual_seed(0)

    def step():
        x = torch.randn(1, 60, 2, 16, generator=random)
        expected, _ = attention(x, x, x, group=ONE_DEVICE, kernel="reference")
        leaf = shard(x, 1).requires_grad_()
        out, _ = attention(leaf, leaf, leaf, cu_seqlens=[0, 60], head_ranks=head_ranks)
        out.sum().backward()
        return (out - shard(expected, 1)).abs().max().item()

    def failing(*_, **__):
        raise OutOfMemoryError("tried to allocate 20 GiB")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(*NEEDED_BEFORE[where], failing)
        with pytest.raises((OutOfMemoryError, RankMismatchError)) as raised:
            step()
    return str(raised.value), step()


@pytest.mark.parametrize("where", NEEDED_BEFORE)
def test_what_one_rank_cannot_make_before_a_call_is_heard_by_all_and_shifts_no_rank(where):
    head_ranks = 2 if NEEDED_BEFORE[where][0] in (head_exchange.Outward, head_exchange.Returning) else 1
    with Pool(2, timeout=2 * PROMPT) as pool:
        (first, first_error), (second, second_error) = pool.run(_out_of_memory_before_the_call, where, head_ranks)
    assert second == "tried to allocate 20 GiB"
    assert "rank 1 raised an error instead of coming to attention: OutOfMemoryError: tried to allocate" in first
    assert max(first_error, second_error) < 1e-5


def _known_calls_then_apart(known, alone):
    """Calls that all ranks know, then rank 1 makes another one of them than the rest; says what was raised."""
    x = torch.randn(1, 16, 2, 16)
    for arguments in (*known, *known):
        attention(x, x, x, **arguments)
    with pytest.raises(RankMismatchError) as raised:
        attention(x, x, x, **known[alone if dist.get_rank() == 1 else 0])
    attention(x, x, x, **known[0])  # ranks are still in step
    return str(raised.value)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("known", "words"),
    [
        ([{"scale": 0.25}, {"scale": 0.5}], ("scale", "0.25", "0.5")),
        ([{"mask": Mask.causal()}, {"mask": Mask.bidirectional()}], ("mask", "right")),
        ([{"partition": "zigzag"}, {"partition": "contiguous"}], ("partition", "zigzag", "contiguous")),
        ([{"seqlen": None}, {"cu_seqlens": [0, 3, 16]}], ("cu_seqlens",)),
        ([{"softcap": 0.0}, {"softcap": 3.0}], ("softcap", "3.0")),
    ],
    ids=["scale", "mask", "partition", "documents", "softcap"],
)
def test_a_rank_that_goes_alone_from_one_known_call_to_another_is_named_in_that_call(known, words, ranks):
    with Pool(ranks, timeout=2 * PROMPT) as pool:
        if "cu_seqlens" in known[1]:
            known = [known[0], {"cu_seqlens": [0, 3, 16 * ranks]}]
        for said in pool.run(_known_calls_then_apart, known, 1):
            assert all(word in said for word in (*words, "on rank 1")), said


def _gradients_on_one_rank(which):
    tensors = {name: torch.randn(1, 16, 2, 16) for name in ("query", "key", "value")}
    tensors[which].requires_grad_(dist.get_rank() == 1)
    attention(**tensors)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_gradients_that_only_one_rank_needs_are_named_before_the_backward_pass(which):
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_gradients_on_one_rank, which):
            assert isinstance(outcome.error, RankMismatchError), outcome.details or "no error"
            assert f'gradients needed: [] on rank 0; ["{which}"] on rank 1' in str(outcome.error)


def _backward_on_one_rank():
    x = torch.randn(1, 16, 2, 16, requires_grad=True)
    out, _ = attention(x, x, x)
    if dist.get_rank() == 1:
        out.sum().backward()
    else:
        attention(x, x, x)


def test_a_backward_pass_that_only_one_rank_takes_is_named():
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_backward_on_one_rank):
            assert isinstance(outcome.error, RankMismatchError), outcome.details or "no error"
            assert 'pass: "forward" on rank 0; "backward" on rank 1' in str(outcome.error)


class OutOfMemoryError(Exception):
    """Stands in for torch's."""


def _out_of_memory(name, after, head_ranks):
    """A function fails once on rank 1, at one of its calls; says what was raised, and the error of the next step."""
    random = torch.Generator().manual_seed(0)
    owner = head_exchange.Returning if name == "fill" else blockwise
    kernel, launches = getattr(owner, name), 0

    def failing(*arguments, **settings):
        nonlocal launches
        launches += 1
        if launches == after and dist.get_rank() == 1:
            raise OutOfMemoryError("tried to allocate 20 GiB")
        return kernel(*arguments, **settings)

    def step():
        x = torch.randn(1, 60, 6, 16, generator=random)
        expected, _ = attention(x, x, x, group=ONE_DEVICE, kernel="reference")
        leaf = shard(x, 1).requires_grad_()
        out, _ = attention(leaf, leaf, leaf, head_ranks=head_ranks, plan="ring")
        out.sum().backward()
        return (out - shard(expected, 1)).abs().max().item()

    step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises((OutOfMemoryError, RankMismatchError)) as raised:
            step()
    return raised.value, step()


@pytest.mark.parametrize(("ranks", "head_ranks", "after"), [(3, 1, 1), (3, 1, 3), (3, 3, 1), (4, 2, 2)])
@pytest.mark.parametrize("name", ["attend", "attend_backward"])
def test_an_error_inside_a_kernel_of_one_rank_ends_that_call_on_all_and_leaves_them_in_step(
    name, ranks, head_ranks, after
):
    _assert_all_hear(ranks, name, after, head_ranks)


@pytest.mark.parametrize("after", [1, 2], ids=["forward", "backward"])
def test_an_error_on_the_way_home_of_one_ranks_heads_ends_that_call_on_all_and_leaves_them_in_step(after):
    _assert_all_hear(4, "fill", after, 2)


def _assert_all_hear(ranks, *failure):
    with Pool(ranks, timeout=2 * PROMPT) as pool:
        outcomes = pool.run(_out_of_memory, *failure)
    assert max(error for _, error in outcomes) < 1e-5
    assert isinstance(outcomes[1][0], OutOfMemoryError)
    for said, _ in (outcomes[0], *outcomes[2:]):
        assert str(said) == "rank 1 raised an error within attention: OutOfMemoryError: tried to allocate 20 GiB"


def _do_not_come(first):
    attend = DistributedFlashAttention(Mask.causal())
    x = torch.randn(1, 6, 2, 16)
    if not first:
        attend(x, x, x)
    if dist.get_rank() == 1:
        attend(x, x, x)


@pytest.mark.parametrize("first", [False, True])
def test_a_rank_that_does_not_come_is_named(first):
    with Pool(2, timeout=30.0, grace=20.0, group_timeout=3.0) as pool:
        absent, waiting = pool.outcomes(_do_not_come, first)
    assert absent.error is None
    assert isinstance(waiting.error, RankMismatchError), waiting.details
    assert ("not every rank has come" if first else "rank 0 has not come to call") in str(waiting.error)
    assert "rank 0 has not" in str(waiting.error)
    assert "imed out" in str(waiting.error)


def _come_too_late(pause):
    """Rank 1 gives its first call up before rank 0 comes to it, and comes to the second one after a pause."""
    attend, x = DistributedFlashAttention(Mask.causal()), torch.full((1, 6, 2, 16), 1.0)
    if dist.get_rank() == 0:
        time.sleep(4.0)
    with pytest.raises(RankMismatchError) as raised:
        attend(x, x, x)
    if dist.get_rank() == 1:
        time.sleep(pause)
    for step in range(2, 4):
        torch.testing.assert_close(attend(x, x, step * x), step * x)  # of one step on all ranks
    return str(raised.value)


@pytest.mark.parametrize("pause", [0.0, 2.5])
def test_who_comes_to_a_first_call_that_others_gave_up_hears_of_it_and_ranks_are_in_step(pause):
    with Pool(2, timeout=30.0, grace=20.0, group_timeout=3.0) as pool:
        late, waiting = pool.run(_come_too_late, pause)
    assert waiting.startswith("not every rank has come to its first call")
    assert late.startswith("rank 1 raised an error instead of coming to attention: RankMismatchError: not every rank")


def _ring(steps, victim, deed):
    generator = torch.Generator().manual_seed(dist.get_rank())
    attend = DistributedFlashAttention(Mask.causal())
    leaf = torch.randn(1, 256, 2, 32, generator=generator).requires_grad_()
    for step in range(steps):
        if step == 5 and dist.get_rank() == victim:
            deed()
        attend(leaf, leaf, leaf).sum().backward()


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _leave():
    os._exit(3)


def _stall():
    time.sleep(60)


@pytest.mark.parametrize("deed", [_kill, _leave])
@pytest.mark.parametrize("victim", [0, 2])
def test_peers_of_a_rank_that_dies_raise_at_once(victim, deed):
    with Pool(3, timeout=30.0, grace=PROMPT, group_timeout=120.0, ends_on_error=True) as pool:
        begin = time.monotonic()
        outcomes = pool.outcomes(_ring, 10**6, victim, deed)
        assert time.monotonic() - begin < 2 * PROMPT
    for outcome in outcomes:
        expected = "died" if outcome.rank == victim else "onnection"
        assert expected in str(outcome.error), outcome.details


def _die_in_an_exchange(exchanges):
    """Rank 1 dies in one of its exchanges of heads."""
    run = head_exchange.HeadExchange.run

    def dying(*arguments):
        nonlocal exchanges
        exchanges -= 1
        if not exchanges and dist.get_rank() == 1:
            _kill()
        run(*arguments)

    head_exchange.HeadExchange.run = dying
    leaf = torch.randn(1, 16, 4, 32, requires_grad=True)
    attention(leaf, leaf, leaf, head_ranks=2)[0].sum().backward()


@pytest.mark.parametrize("exchange", [1, 2, 3, 4])
def test_peers_of_a_rank_that_dies_in_an_exchange_of_heads_raise_at_once(exchange):
    with Pool(4, timeout=30.0, grace=PROMPT, group_timeout=120.0, ends_on_error=True) as pool:
        outcomes = pool.outcomes(_die_in_an_exchange, exchange)
    for outcome in outcomes:
        assert ("died" if outcome.rank == 1 else "onnection") in str(outcome.error), outcome.details
        assert outcome.seconds < 2 * PROMPT


def test_peers_of_a_rank_that_stalls_raise_when_the_groups_timeout_is_over():
    with Pool(2, timeout=30.0, grace=1.0, group_timeout=3.0) as pool:
        outcomes = pool.outcomes(_ring, 10**6, 1, _stall)
    assert "imed out" in str(outcomes[0].error), outcomes[0].details
    assert 2.0 < outcomes[0].seconds < 15.0
    assert "had not answered" in str(outcomes[1].error)
