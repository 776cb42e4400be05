"""Calls that go down a list ask for what they ask for when they find their own way.

Copy engines and kernels are those of GPUs that are not there (`copy_engines`), and all requests are noted. Addresses
differ from call to call: those in tensors of the call, in memory of the ranks and in gradients are held against each
other by their place, all others by which requests have the same.
"""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from random import Random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from copy_engines import Asked, Machine, failing, one_of_ranks
from stand_in import Launched, StandIn
from torch import Tensor

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.kernels.gpu import direct_launch, recording, round_numbers
from ringflash.parallel.execution import head_groups, known_calls
from ringflash.parallel.execution.call import Inputs, as_they_travel
from ringflash.parallel.execution.known_calls import TRIES, UNNOTED
from ringflash.parallel.transport import symmetric_memory

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

LEAST_ADDRESS = 1 << 32

BETWEEN = ("numbers", "copy")
"""What is asked for between GPUs."""


@contextmanager
def everything_stays(asked: Asked) -> Iterator[None]:
    """No memory is given back, so that addresses tell tensors apart; and what torch is asked for is noted."""
    held = []

    def keeping(owner: object, name: str, note: str | None = None):
        original = getattr(owner, name)

        def run(x: Tensor, *arguments: object, **settings: object) -> Tensor:
            found = original(x, *arguments, **settings)
            if isinstance(x, Tensor) and (found is not x or name == "copy_"):
                held.append(found)
                source = {"to": x, "clone": x, "copy_": next(iter(arguments), x)}.get(name)
                if note is not None:
                    asked.append((note, found.data_ptr(), *([] if source is None else [source.data_ptr()])))
            return found

        return mock.patch.object(owner, name, run)

    with (
        keeping(Tensor, "new_empty"),
        keeping(Tensor, "new_zeros", "zero"),
        keeping(Tensor, "to", "round"),
        keeping(Tensor, "copy_", "copy within"),
        keeping(Tensor, "clone", "copy within"),
        keeping(torch, "empty_like"),
        keeping(torch, "zeros_like", "zero"),
    ):
        yield


@contextmanager
def parameters_known() -> Iterator[dict[int, tuple[int, int]]]:
    """By the address of a launch's parameters how many there are, and how many of them are addresses."""
    found = {}
    original = direct_launch.Laid.__init__

    def init(self, of, *rest) -> None:
        original(self, of, *rest)
        found[self.address] = of

    with mock.patch.object(direct_launch.Laid, "__init__", init):
        yield found


def values(launched: Launched, of: direct_launch.Parameters) -> tuple:
    """What a kernel is handed."""
    places = (ctypes.c_uint64 * of.count).from_address(launched.parameters)
    pointers = [ctypes.c_uint64.from_address(places[place]).value for place, _ in of.pointers]
    numbers = [ctypes.string_at(places[place], len(value)) for place, value in of.numbers]
    maps = [launched.maps[places[place]] for place, *_ in of.maps]
    return launched.function, launched.grid, *pointers, *numbers, *maps


@contextmanager
def gone_down() -> Iterator[list[recording.Repeated]]:
    """The lists that calls go down."""
    ran, original = [], recording.Repeated.run

    def run(self, *arguments):
        ran.append(self)
        return original(self, *arguments)

    with mock.patch.object(recording.Repeated, "run", run):
        yield ran


def requests(
    sharding: Sharding,
    shapes: list[tuple[int, ...]],
    needed: list[bool],
    repeats: bool,
    settings: Callable[[], dict[str, object]],
) -> tuple[list, int]:
    """Those of both passes of a call behind some alike, each with tensors of its own; and how many went by a list."""
    kept = []
    with (
        one_of_ranks(sharding) as (asked, driver),
        parameters_known() as known,
        torch.autograd.set_multithreading_enabled(False),
        gone_down() as ran,
        mock.patch.object(known_calls, "UNNOTED", UNNOTED if repeats else 1 << 30),
    ):
        rounded = lambda: {x._by_driver._function for x in round_numbers.launchers.values()}  # noqa: E731
        engines = sharding._placement.transport

        def launch(launched: object) -> None:
            if not isinstance(launched, Launched):
                asked.append(("launch by Triton",))
                return
            function, _, *addresses = found = values(launched, known[launched.parameters])
            if function in rounded():
                pairs = [x for x in addresses if isinstance(x, int)]
                asked.extend([("round", pairs[i + 1], pairs[i]) for i in range(0, len(pairs), 2)])
            else:
                asked.append(("launch", *found))

        driver.append = launch
        for _ in range(UNNOTED + 3):
            of = zip(shapes, needed, strict=True)
            leaves = [torch.zeros(1, *x, dtype=torch.bfloat16, requires_grad=y) for x, y in of]
            kept.append(leaves)
            asked.clear()
            with everything_stays(asked):
                given_settings = settings()
                out, lse = attention(*leaves, sharding=sharding, **given_settings)
                dout, dlse = torch.ones_like(out), torch.ones_like(lse)
                given = [x for x, y in zip(leaves, needed, strict=True) if y]
                of_lse = [(lse, dlse)] if len(given) == 1 else []
                outs, douts = zip((out, dout), *of_lse, strict=True)
                gradients = torch.autograd.grad(outs, given, douts)
            kept.append((out, lse, dout, dlse, gradients, given_settings))
        places = [*leaves, out, lse, dout, dlse, *gradients, engines._memory, engines._shelf, engines._progress]
        places += [x for x in given_settings.values() if isinstance(x, Tensor)]
        return named(asked, places), len(ran)


def named(asked: Asked, tensors: list[Tensor]) -> list:
    """Requests with places in tensors, or numbers in the order in which they come first, in place of addresses."""
    others: dict[int, int] = {}

    def name(x: object) -> object:
        if isinstance(x, (tuple, list)):
            return tuple(map(name, x))
        if not isinstance(x, int) or x < LEAST_ADDRESS:
            return x
        for number, tensor in enumerate(tensors):
            behind = x - tensor.data_ptr()
            if 0 <= behind < tensor.untyped_storage().nbytes():
                return f"tensor {number} + {behind}"
        return f"other {others.setdefault(x, len(others))}"

    return [name(within(x)) for x in asked]


def within(request: tuple) -> tuple:
    """What is asked for within a GPU, as torch is asked for it."""
    what, *arguments = request
    if what == "copy rows within":
        return "copy within", arguments[0].target, arguments[0].source
    return request[:3] if what == "copy within" else request[:2] if what == "zero" else request


CASES = {
    "causal": {},
    "window": {"mask": Mask.sliding_window(300, 0)},
    "bidirectional": {"mask": Mask.bidirectional()},
    "documents": {"cu_seqlens": [0, 100, 1700, 1800, 4096]},
    "ring": {"plan": "ring"},
    "deterministic": {"call": lambda: {"deterministic": True}},
    "dropout and softcap": {
        "call": lambda: {"dropout": 0.5, "dropout_seed": torch.zeros(1, dtype=torch.int64), "softcap": 30.0}
    },
    "sinks": {"call": lambda: {"sinks": torch.zeros(4)}},
}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_calls_by_a_list_ask_for_the_same(case: str, rank: int) -> None:
    settings = {"mask": Mask.causal(), "seqlen": 4096} | CASES[case]
    of_call = settings.pop("call", dict)
    sharding = Sharding(settings.pop("mask"), rank=rank, ranks=4, head_ranks=1, **settings)
    shapes = [(sharding.tokens, 4, 64), (sharding.tokens, 2, 64), (sharding.tokens, 2, 64)]
    for needed in ([True] * 3, [True, False, False], [False, True, False]):
        walked, none = requests(sharding, shapes, needed, False, of_call)
        repeated, some = requests(sharding, shapes, needed, True, of_call)
        assert none == 0
        assert some == 2
        assert repeated == walked


@contextmanager
def repeating(sharding: Sharding, attend) -> Iterator[tuple[Asked, list]]:
    """What is asked for once calls of a form go by a list, and which lists were gone down."""
    with one_of_ranks(sharding) as (asked, driver), gone_down() as ran:
        driver.append = lambda x: asked.append(("launch", x))
        for _ in range(UNNOTED + 3):
            attend()
        assert len(ran) == 1
        ran.clear()
        asked.clear()
        yield asked, ran


def causal() -> tuple[Sharding, Tensor]:
    sharding = Sharding(Mask.causal(), seqlen=1024, rank=0, ranks=4, head_ranks=1)
    return sharding, torch.zeros(1, sharding.tokens, 2, 64, dtype=torch.bfloat16)


def test_tensors_that_are_one_in_some_calls_only_make_other_lists() -> None:
    sharding, x = causal()
    with repeating(sharding, lambda: attention(x, x, x, sharding=sharding)) as (_, ran):
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(UNNOTED + 2):
            attention(x, y, z, sharding=sharding)
        assert not ran
        attention(x, z, y, sharding=sharding)
        attention(y, y, y, sharding=sharding)
        assert len(set(ran)) == 2


def test_tensors_that_lie_in_each_other_in_some_calls_only_go_by_no_list_of_those() -> None:
    sharding, x = causal()
    half = sharding.tokens // 2
    whole, value = torch.zeros(1, 2 * sharding.tokens, 2, 64, dtype=torch.bfloat16), torch.zeros_like(x)
    with one_of_ranks(sharding) as (asked, driver), everything_stays(asked):
        driver.append = lambda _: None

        def attend(query: Tensor, key: Tensor) -> list:
            asked.clear()
            attention(query, key, value, sharding=sharding)
            return named(asked, [query, key])

        walked = attend(x, apart := torch.zeros_like(x))
        for _ in range(UNNOTED + 2):
            attend(whole[:, half : half + sharding.tokens], whole[:, : sharding.tokens])
        copied = [x[-1] for x in attend(x, apart) if x[0] == "copy within"]
        assert copied == [x[-1] for x in walked if x[0] == "copy within"]


def test_gradients_that_are_one_row_for_all_are_not_copied_as_rows() -> None:
    sharding, x = causal()
    with one_of_ranks(sharding) as (asked, driver), torch.autograd.set_multithreading_enabled(False):
        driver.append = lambda _: None
        for _ in range(UNNOTED + 4):
            asked.clear()
            out, _ = attention(*[x.clone().requires_grad_() for _ in range(3)], sharding=sharding)
            out.sum(1).backward(torch.ones(1, 2, 64, dtype=torch.bfloat16))
            for what, *arguments in asked:
                if what == "copy rows within":
                    assert min(arguments[0].target_pitch, arguments[0].source_pitch) >= arguments[0].width


@pytest.mark.parametrize(
    "other",
    [
        lambda x, sharding: attention(x, x, x, sharding=sharding, scale=0.5),
        lambda x, sharding: attention(x.half(), x.half(), x.half(), sharding=sharding),
        lambda x, sharding: attention(*[torch.zeros(1, *x.shape[1:3], 128).bfloat16()] * 3, sharding=sharding),
        lambda x, sharding: attention(*[x.transpose(1, 2).contiguous().transpose(1, 2)] * 3, sharding=sharding),
        lambda x, sharding: attention(x, x, x, sharding=sharding, alibi_slopes=torch.ones(2)),
        lambda x, sharding: attention(x, x, x, sharding=sharding, softcap=3.0),
    ],
)
def test_calls_of_another_form_find_their_own_way(other) -> None:
    sharding, x = causal()
    with repeating(sharding, lambda: attention(x, x, x, sharding=sharding)) as (_, ran):
        other(x, sharding)
        assert not ran


@contextmanager
def another_stream() -> Iterator[None]:
    with mock.patch.object(StandIn, "get_current_stream", return_value=7):
        yield


def in_another_thread(attend: Callable[[], object]) -> None:
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(attend).result()


@pytest.mark.parametrize("other", ["nothing", "mask", "strides", "thread", "stream", "gradients"])
def test_what_a_list_was_made_for_is_told_apart_one_by_one(other: str) -> None:
    masks = [Mask.causal(), Mask.bidirectional()]
    sharding = Sharding(masks, seqlen=1024, rank=0, ranks=4, head_ranks=1)
    x, y, z = (torch.zeros(1, sharding.tokens, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    strided = torch.zeros(1, 2, sharding.tokens, 64, dtype=torch.bfloat16).transpose(1, 2)
    attend = partial(attention, x, y, z, mask=masks[0], sharding=sharding)
    with repeating(sharding, attend) as (_, ran):
        match other:
            case "nothing":
                attend()
            case "mask":
                attend(mask=masks[1])
            case "strides":
                attention(strided, y, z, mask=masks[0], sharding=sharding)
            case "thread":
                in_another_thread(attend)
            case "stream":
                with another_stream():
                    attend()
            case "gradients":
                attention(x, y, torch.zeros_like(z, requires_grad=True), mask=masks[0], sharding=sharding)
        assert len(ran) == (other == "nothing")


def test_heads_in_groups_have_a_list_each() -> None:
    sharding, x = causal()
    with (
        one_of_ranks(sharding) as (asked, driver),
        gone_down() as ran,
        mock.patch.object(head_groups, "_groups", return_value=2),
        mock.patch.dict(vars(sharding._placement), short=False),
    ):
        driver.append = asked.append
        for _ in range(UNNOTED + TRIES):
            attention(x, x, x, sharding=sharding, dropout=0.5, dropout_seed=torch.zeros(1, dtype=torch.int64))
    assert len(set(ran)) == 2


def test_calls_find_their_way_anew_where_keys_are_laid_out_elsewhere_since() -> None:
    sharding, x = causal()
    with (
        parameters_known() as known,
        repeating(sharding, lambda: attention(x, x, x, sharding=sharding)) as (asked, ran),
    ):
        engines = sharding._placement.transport
        for calls in (0, 3, 6):
            shelf = torch.zeros(1 << 22, dtype=torch.uint8)
            engines.use_shelf(shelf, None)
            for repeated in (0, 0, 1, 2, 3):
                asked.clear()
                attention(x, x, x, sharding=sharding)
                assert len(ran) == calls + repeated
                _, _, _, _, target, *_ = values(asked[1][1], known[asked[1][1].parameters])
                assert target == shelf.data_ptr()


def test_a_call_that_has_no_memory_for_all_at_once_finds_its_own_way_from_then_on() -> None:
    sharding, x = causal()
    with repeating(sharding, lambda: attention(x, x, x, sharding=sharding)) as (asked, ran):
        attention(x, x, x, sharding=sharding)
        by_list = [what for what, *_ in asked if what in BETWEEN]
        ran.clear()
        error = torch.OutOfMemoryError("none in one piece")
        with mock.patch.object(recording.Repeated, "memory", side_effect=error) as memory:
            for _ in range(UNNOTED + TRIES + 2):
                asked.clear()
                attention(x, x, x, sharding=sharding)
        assert memory.call_count == 1
        assert not ran
        assert [what for what, *_ in asked if what in BETWEEN] == by_list


def test_calls_that_are_noted_and_the_first_by_a_list_wait_for_the_others_and_no_others_do() -> None:
    (sharding, x), machine = causal(), Machine(4)
    with one_of_ranks(sharding, machine) as (_, driver):
        driver.append = lambda _: None
        for _ in range(UNNOTED + 5):
            attention(x, x, x, sharding=sharding)
    assert machine.waited == [UNNOTED <= number < UNNOTED + 3 for number in range(UNNOTED + 5)]


def test_where_a_rank_cannot_wait_alone_calls_find_their_way() -> None:
    (sharding, x), machine = causal(), Machine(4, by_page=False)
    with one_of_ranks(sharding, machine) as (_, driver), mock.patch.object(known_calls, "Recording") as noted:
        driver.append = lambda _: None
        for _ in range(UNNOTED + 4):
            attention(x, x, x, sharding=sharding)
        assert not noted.called


def test_streams_are_let_go_on_alone_once_nothing_comes_any_more() -> None:
    sharding, x = causal()
    short = {"PATIENCE": 0.5, "GRACE": 0.2}
    with one_of_ranks(sharding) as (asked, driver), mock.patch.multiple(symmetric_memory, **short):
        driver.append = lambda _: None
        attention(x, x, x, sharding=sharding)
        engines = sharding._placement.transport
        asked.clear()
        engines.abandon()
        for number in range(20):
            engines._progress[0] = number  # of calls that all ranks have made
            time.sleep(0.05)
        assert not asked
        [alone] = [thread for thread in threading.enumerate() if thread.name == "ringflash goes on alone"]
        assert not alone.daemon
        alone.join(timeout=10)
        assert not alone.is_alive()
        assert {what for what, *_ in asked} == {"numbers"}


def test_a_launch_that_fails_is_an_error_once_others_have_what_they_wait_for() -> None:
    sharding, x = causal()
    with repeating(sharding, lambda: attention(x, x, x, sharding=sharding)) as (asked, _):
        attention(x, x, x, sharding=sharding)
        whole = [what for what, *_ in asked]
        for list_of in sharding._placement.transport.known_calls[sharding._placement].values():
            steps = list_of.repeated._steps
            first = next(i for i, (*_, is_work) in enumerate(steps) if is_work)
            steps[first] = (mock.Mock(side_effect=RuntimeError("a launch failed")), *steps[first][1:])
        asked.clear()
        with pytest.raises(RuntimeError, match="a launch failed"):
            attention(x, x, x, sharding=sharding)
        for_others = [what for what in whole if what in ("numbers", "copy", "copy rows", "event")]
        assert [what for what, *_ in asked] == for_others


def between(calls: int, which: str, fails: bool) -> list[str]:
    """What is asked for between GPUs by a pass behind some calls alike."""
    sharding, _ = causal()
    with one_of_ranks(sharding) as (asked, driver), torch.autograd.set_multithreading_enabled(False):
        driver.append = lambda _: None
        engines = sharding._placement.transport
        for number in range(calls + 1):
            last = number == calls
            leaves = [torch.zeros(1, sharding.tokens, 2, 64).bfloat16().requires_grad_() for _ in range(3)]
            passes = failing(sharding, which) if fails and last else nullcontext()
            raises = pytest.raises(RuntimeError, match="a launch failed") if fails and last else nullcontext()
            forward, backward = (passes, nullcontext()) if which == "forward" else (nullcontext(), passes)
            asked.clear()
            with raises:
                with forward:
                    out, _ = attention(*leaves, sharding=sharding)
                if last and which == "forward":
                    break
                if last:
                    asked.clear()
                with backward:
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
        ours = [engines._memory, engines._shelf, engines._progress]
        return [re.sub("other [0-9]+", "elsewhere", str(x)) for x in named(asked, ours) if x[0] in BETWEEN]


@pytest.mark.parametrize("calls", [UNNOTED - 1, UNNOTED, UNNOTED + 2], ids=["known", "noted", "by a list"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_other_ranks_get_what_they_wait_for_of_a_pass_that_fails(which: str, calls: int) -> None:
    whole = between(calls, which, False)
    assert len(whole) > 5
    assert between(calls, which, True) == whole


def test_lists_go_with_the_sharding_that_they_are_of() -> None:
    sharding, x = causal()
    with repeating(sharding, lambda: attention(x, x, x, sharding=sharding)) as (_, ran):
        engines, (other, _) = sharding._placement.transport, causal()
        other._placement.group = sharding._placement.group
        for _ in range(UNNOTED + 3):
            attention(x, x, x, sharding=other)
        assert len(ran) == 1
        assert len(engines.known_calls) == 2
        del other
        gc.collect()
        assert list(engines.known_calls) == [sharding._placement]


@pytest.mark.parametrize("head_ranks", [1, 2])
def test_strided_keys_are_copied_once_at_most(head_ranks: int) -> None:
    sharding = Sharding(Mask.causal(), seqlen=1024, rank=0, ranks=4, head_ranks=head_ranks)
    placement = sharding._placement
    placement.group = SimpleNamespace(size=lambda: 4)
    query, key, value = torch.zeros(sharding.tokens, 3, 2, 64).unbind(1)
    given = Inputs(query, key, value, *(None,) * (len(Inputs._fields) - 3))
    found = as_they_travel(given, placement)
    assert found.query is query
    assert found.key.is_contiguous() is (head_ranks == 1)  # heads that cross are copied from any strides
    assert as_they_travel(found, placement) is found


def interleaved(rank: int, seed: int, repeats: bool) -> tuple[list, int]:
    """What is asked for between GPUs by passes of calls of two shardings in any order; and how many went by a list."""
    random, pending = Random(seed), []
    masks = (Mask.causal(), 1024), (Mask.sliding_window(300, 0), 2048)
    shardings = [Sharding(mask, seqlen=n, rank=rank, ranks=4, head_ranks=1) for mask, n in masks]
    with (
        one_of_ranks(shardings[0]) as (asked, driver),
        torch.autograd.set_multithreading_enabled(False),
        gone_down() as ran,
        mock.patch.object(known_calls, "UNNOTED", UNNOTED if repeats else 1 << 30),
    ):
        driver.append = lambda _: None
        engines, shardings[1]._placement.group = shardings[0]._placement.transport, shardings[0]._placement.group
        for _ in range(60):
            if not pending or random.random() < 0.5:
                sharding, scale = random.choice(shardings), random.choice([None, 0.5])
                leaves = [torch.zeros(1, sharding.tokens, 2, 64).bfloat16().requires_grad_() for _ in range(3)]
                pending.append((attention(*leaves, sharding=sharding, scale=scale)[0], leaves))
            else:
                (out, leaves), again = random.choice(pending), random.random() < 0.3
                torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=again)
                pending = [x for x in pending if again or x[0] is not out]
        ours = [engines._memory, engines._shelf, engines._progress]
        between = [re.sub("other [0-9]+", "elsewhere", str(x)) for x in named(asked, ours) if x[0] in BETWEEN]
    return between, len(ran)


@pytest.mark.parametrize("rank", [0, 2])
def test_calls_by_a_list_among_others_in_any_order_leave_flags_and_chunks_as_those_do(rank: int) -> None:
    for seed in range(2):
        walked, none = interleaved(rank, seed, False)
        repeated, some = interleaved(rank, seed, True)
        assert none == 0
        assert some > 5
        assert repeated == walked
