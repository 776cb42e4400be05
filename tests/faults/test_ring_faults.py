"""Ranks that disagree, die or stall: every rank gets an error that says who and what, and nothing hangs.

Each test starts processes of its own, because they end in a state that no other test should meet.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parent.parent / "parallel"))
from pool import Pool

from ringflash import (
    ArgumentError,
    DistributedFlashAttention,
    Mask,
    Partition,
    RankMismatchError,
    UnsupportedError,
    unshard,
)
from ringflash.compat.ring_flash_attn import (
    ring_flash_attn_func,
    ring_flash_attn_qkvpacked_func,
    ring_flash_attn_varlen_func,
)
from ringflash.functional import attention
from ringflash.parallel.agreement.agreement import Agreement, agreement, signature
from ringflash.parallel.agreement.history import PERIOD
from ringflash.parallel.execution import executor

PROMPT = 10.0
"""Seconds within which a disagreement must be an error on every rank."""


def _attend(odd_rank, differs):
    """Forward and backward in which one rank has other arguments than the rest."""
    arguments = {"dtype": torch.float32, "heads": 4, "key_heads": 2, "head_dim": 16, "batch": 1, "rows": 6}
    arguments |= {"mask": Mask.causal(), "partition": "contiguous", "scale": None, "cu_seqlens": None, "sinks": None}
    if dist.get_rank() == odd_rank:
        assert set(differs) <= set(arguments)
        arguments |= differs
    heads = (arguments["heads"], arguments["key_heads"], arguments["key_heads"])
    query, key, value = (
        torch.randn(arguments["batch"], arguments["rows"], count, arguments["head_dim"], dtype=arguments["dtype"])
        for count in heads
    )
    attend = DistributedFlashAttention(arguments["mask"], partition=arguments["partition"], scale=arguments["scale"])
    attend(
        query.requires_grad_(), key, value, cu_seqlens=arguments["cu_seqlens"], sinks=arguments["sinks"]
    ).sum().backward()


DISAGREEMENTS = {
    "dtype": ({"dtype": torch.float16}, ("dtype", "float32", "float16")),
    "heads": ({"heads": 8}, ("heads", "4", "8")),
    "key heads": ({"key_heads": 4}, ("heads", "2", "4")),
    "head dimension": ({"head_dim": 32}, ("head_dim", "16", "32")),
    "tokens": ({"rows": 7}, ("seqlen", "18", "21")),
    "batch": ({"batch": 2}, ("batch", "1", "2")),
    "mask": ({"mask": Mask.sliding_window(3)}, ("mask", "right", "left")),
    "documents": ({"cu_seqlens": [0, 5, 18]}, ("cu_seqlens",)),
    "documents of the mask": ({"mask": Mask.causal() & Mask.documents([0, 5, 18])}, ("cu_seqlens",)),
    "partition": ({"partition": "zigzag"}, ("partition", "contiguous", "zigzag")),
    "scale": ({"scale": 0.5}, ("scale", "0.25", "0.5")),
    "sinks": ({"sinks": torch.ones(4)}, ("sinks given", "false", "true")),
}


@pytest.mark.parametrize("odd_rank", [0, 2])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_are_told_on_every_rank_who_and_what(what, odd_rank):
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


def _attend_then_apart():
    attend = DistributedFlashAttention(Mask.causal())
    for rows in (6, 8):
        attend(*[torch.randn(1, rows, 2, 16)] * 3)
    attend(*[torch.randn(1, 6 if dist.get_rank() else 8, 2, 16)] * 3)


def test_a_rank_that_goes_back_alone_to_a_call_that_agreed_before_gets_no_result():
    with Pool(2, timeout=30.0, grace=20.0, group_timeout=3.0) as pool:
        repeats, goes_back = pool.outcomes(_attend_then_apart)
    assert repeats.error is not None
    assert isinstance(goes_back.error, RankMismatchError)
    assert "rank 0 has not come" in str(goes_back.error)


REFUSED = {
    "scale": ({"scale": -1.0}, "scale=-1.0"),
    "key heads": ({"key_heads": 3}, "query has 4 heads, key 3"),
    "documents": ({"cu_seqlens": [0, 5, 17]}, r"cu_seqlens=(0, 5, 17)"),
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
def test_an_error_of_one_rank_is_told_to_those_that_would_wait_for_it(what):
    differs, words = REFUSED[what]
    with Pool(3, timeout=PROMPT) as pool:
        first, odd, last = pool.run(_attend_refused_once, differs)
    assert isinstance(odd, ArgumentError)
    for told in (first, last):
        assert isinstance(told, RankMismatchError)
        assert f"rank 1 raised an error instead of coming to attention: ArgumentError: {odd}" in str(told)
        assert words in str(told)


def _flash(wrong, compiled):
    """flash-attn's function over the ranks; arguments that rank 1 alone has replace the right ones."""
    x = torch.randn(1, 6, 2, 8)
    arguments = {"q": x, "k": x, "v": x} | (wrong if dist.get_rank() == 1 else {})
    torch.compiler.reset()
    function = ring_flash_attn_func if compiled is None else _compiled(ring_flash_attn_func, compiled)
    return function(**arguments)


def _packed(wrong, compiled):
    x = torch.randn(6, 2, 8)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens": [0, 4, 12], "max_seqlen": 8}
    arguments |= wrong if dist.get_rank() == 1 else {}
    torch.compiler.reset()
    function = ring_flash_attn_varlen_func if compiled is None else _compiled(ring_flash_attn_varlen_func, compiled)
    return function(**arguments)


def _packed_together(wrong, compiled):
    return ring_flash_attn_qkvpacked_func(torch.randn(1, 6, 2 if dist.get_rank() == 1 else 3, 2, 8))


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
        (_flash, {"softcap": "5"}, "'<'"),
        (_packed, {"max_seqlen": 3}, "max_seqlen=3; the longest sequence has 8"),
        (_packed, {"dropout_p": 2.0}, "dropout_p=2.0"),
        (_packed_together, {}, "qkv has shape (1, 6, 2, 2, 8)"),
    ],
    ids=["window", "shape", "type", "longest", "dropout", "packed"],
)
def test_an_error_in_the_arguments_of_flash_attns_functions_is_told(function, wrong, words):
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
def test_an_error_in_the_arguments_of_compiled_attention_is_told(function, wrong, words, fullgraph):
    with Pool(2, timeout=30.0, group_timeout=20.0) as pool:
        first, second = pool.run(_refused_once, function, wrong, fullgraph)
    assert words in second if not fullgraph else "Unsupported" in second  # torch's word for a trace that fails
    assert first.startswith("RankMismatchError: rank 1 raised an error instead of coming to attention: ArgumentError")
    assert words in first


def _attend_without_kernels():
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(executor, "select", _nothing_there)
        with pytest.raises((ArgumentError, RankMismatchError)) as raised:
            _attend(1, {})
    _attend(1, {})  # ranks are still in step
    return str(raised.value)


def _nothing_there(*problem):
    raise ArgumentError("kernel='triton' cannot run: the package triton is not installed")


def test_a_kernel_that_one_machine_lacks_is_told():
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


def test_vmap_on_one_rank_is_told_to_the_others():
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


def _compare_in_two_lives():
    Agreement(dist.group.WORLD).check(signature({"seqlen": 6}))
    if dist.get_rank() == 0:
        time.sleep(0.5)
    Agreement(dist.group.WORLD).check(signature({"seqlen": 8}))


def test_what_an_earlier_group_of_the_same_name_left_in_the_store_is_not_compared():
    with Pool(2, timeout=PROMPT) as pool:
        pool.run(_compare_in_two_lives)


def _swap_once(calls, alone):
    """Two calls that follow each other in both orders; then one rank makes the other one."""
    texts = [signature({"scale": scale, "seqlen": 6}) for scale in (0.25, 0.5)]
    comparer = Agreement(dist.group.WORLD)
    for index in range(calls):
        comparer.check(texts[(index + (index == alone and dist.get_rank() == 1)) % 2])


def test_ranks_that_make_the_same_calls_hear_nothing():
    with Pool(2, timeout=PROMPT) as pool:
        pool.run(_swap_once, 9 * PERIOD + 1, -1)


def _make_calls(numbers):
    comparer = Agreement(dist.group.WORLD)
    for _ in range(numbers[dist.get_rank()]):
        comparer.check(signature({"seqlen": 6}), patience=timedelta(seconds=0.5))


@pytest.mark.parametrize("periods", [0, 5])
def test_a_rank_that_falls_two_periods_behind_is_noticed(periods):
    numbers = (periods + 2) * PERIOD, periods * PERIOD + 1
    with Pool(2, timeout=PROMPT) as pool:
        first, second = pool.outcomes(_make_calls, numbers)
    assert second.error is None
    assert f"rank 0 has made {numbers[0]} calls to attention" in str(first.error)


@pytest.mark.parametrize("alone", [10, PERIOD - 1, 2 * PERIOD + 5])
def test_a_rank_that_repeats_while_another_changes_is_found_a_period_later(alone):
    last = (alone // PERIOD + 2) * PERIOD
    with Pool(2, timeout=PROMPT) as pool:
        for outcome in pool.outcomes(_swap_once, last, alone):
            assert isinstance(outcome.error, RankMismatchError), outcome.details or "no error"
            values = ("0.25", "0.5") if alone % 2 == 0 else ("0.5", "0.25")
            said = f"ranks disagree on scale: {values[0]} on rank 0; {values[1]} on rank 1"
            assert f"{last - alone} calls to attention ago {said}" in str(outcome.error)


def _come_alone():
    values = {"seqlen": 6}
    agreement(dist.group.WORLD).check(signature(values))
    if dist.get_rank() == 1:
        agreement(dist.group.WORLD).check(signature({"seqlen": 8}), patience=timedelta(seconds=1))


def test_a_rank_that_does_not_come_is_named_with_what_it_did_last():
    with Pool(2, timeout=PROMPT) as pool:
        first, second = pool.outcomes(_come_alone)
    assert first.error is None
    assert isinstance(second.error, RankMismatchError)
    assert "rank 0 has not come" in str(second.error)
    assert '{"seqlen": 6}' in str(second.error)


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


def test_peers_of_a_rank_that_stalls_raise_when_the_groups_timeout_is_over():
    with Pool(2, timeout=30.0, grace=1.0, group_timeout=3.0) as pool:
        outcomes = pool.outcomes(_ring, 10**6, 1, _stall)
    assert "imed out" in str(outcomes[0].error), outcomes[0].details
    assert 2.0 < outcomes[0].seconds < 15.0
    assert "had not answered" in str(outcomes[1].error)


def test_a_comparison_is_made_once_for_each_new_signature():
    with Pool(2, timeout=PROMPT) as pool:
        pool.run(_compare_once)


def _compare_once():
    comparer = Agreement(dist.group.WORLD)
    comparer.check(signature({"seqlen": 6}))
    begin = time.monotonic()
    for _ in range(200):
        comparer.check(signature({"seqlen": 6}))
    assert time.monotonic() - begin < 0.5
    comparer.check(signature({"seqlen": 7}))
