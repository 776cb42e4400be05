"""A list of what a call asked for is what another call has to ask for, or there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from stand_in import stand_in
from torch import Tensor

from ringflash.kernels.cuda_driver import Memory
from ringflash.kernels.gpu import direct_launch, recording
from ringflash.kernels.gpu.recording import Recording, Repeated
from ringflash.kernels.requests import ask, cannot_repeat, draw, of_thread, unnoted

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

STREAM = 5


def noted(given: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]) -> tuple[Recording, Sequence[Tensor]]:
    with Recording(given, STREAM) as found:
        results = run()
    assert of_thread.noting is None
    return found, results


def repeat(repeated: Repeated, given: Sequence[Tensor]) -> tuple[list[Tensor], Exception | None]:
    memory = repeated.memory(given)
    failure = repeated.run([x.data_ptr() for x in given], memory)
    return memory, failure


def test_addresses_are_those_of_the_tensors_and_the_memory_of_each_call() -> None:
    asked, fixed = [], torch.ones(4)

    def run(x: Tensor) -> list[Tensor]:
        between, result = x.new_empty(6), torch.empty_like(x)
        addresses = [x.data_ptr() + 4, between[2:].data_ptr(), result.data_ptr(), fixed.data_ptr()]
        ask("something", asked.append, addresses)
        return [result]

    x, y = torch.ones(5), torch.ones(5)
    found, results = noted([x], lambda: run(x))
    assert found.void is None
    repeated = found.repeated(results)
    assert repeated is not None
    (result, between), failure = repeat(repeated, [y])
    assert failure is None
    assert (result.shape, result.dtype) == (x.shape, x.dtype)
    assert asked[-1] == [y.data_ptr() + 4, between.data_ptr() + 8, result.data_ptr(), fixed.data_ptr()]
    assert asked[0][0] == x.data_ptr() + 4


def test_what_is_drawn_is_drawn_in_each_call() -> None:
    asked, numbers = [], iter(range(1000, 9000, 1000))

    def run() -> list[Tensor]:
        for _ in range(2):
            [address] = draw("a number", lambda _: [next(numbers)], [16])
            ask("something", asked.append, [address + 4])
        return []

    found, results = noted([torch.ones(1)], run)
    repeated = found.repeated(results)
    assert repeated is not None
    repeat(repeated, [torch.ones(1)])
    assert asked == [[1004], [2004], [3004], [4004]]
    assert found.form() == noted([torch.ones(1)], run)[0].form()


@pytest.mark.parametrize(
    ("why", "run"),
    [
        ("aten.add.Tensor", lambda x: x + 1),
        ("by hand", lambda x: cannot_repeat("by hand")),
        ("a copy of what lies apart within rows", lambda x: x.new_empty(4, 4).copy_(x.view(4, 4).T)),
        ("a copy of rows that lie in each other", lambda x: x[:4].expand(4, 4).contiguous()),
        ("a copy of rows that lie in each other", lambda x: x.new_empty(4, 4).copy_(x.as_strided((4, 4), (2, 1)))),
        ("a copy to memory that is not the call's", lambda x: torch.frombuffer(bytearray(64), dtype=x.dtype).copy_(x)),
        ("a conversion", lambda x: x.to(torch.float64)),
        ("zeros that lie apart", lambda x: x.new_empty(4, 4)[:, 1].zero_()),
    ],
)
def test_whatever_is_not_known_makes_a_recording_void(why: str, run: Callable) -> None:
    assert noted([x := torch.ones(16)], lambda: run(x))[0].void == why


@pytest.mark.parametrize("first", [lambda x: x[:8], lambda x: x.view(8, 2)[:, 0]])
def test_tensors_that_lie_in_each_other_make_a_recording_void(first: Callable) -> None:
    x = torch.ones(16)
    assert noted([first(x), x[1:9]], lambda: [])[0].void == recording.WITHIN
    assert noted([first(x), x[1:1]], lambda: [])[0].void is None
    assert noted([first(x), x[:4]], lambda: [])[0].void is None
    assert noted([x[:8], x[8:]], lambda: [])[0].void is None


def test_a_launch_by_triton_makes_a_recording_void_while_another_thread_has_ended_its_own() -> None:
    hook, x = triton.knobs.runtime.launch_enter_hook, torch.ones(1)
    with Recording([x], STREAM) as found:
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(noted, [x], lambda: []).result()
        assert found.void is None
        hook("a launch")
    assert found.void == direct_launch.BY_TRITON
    assert not hook.calls


def test_results_that_are_not_memory_of_their_own_are_not_repeated() -> None:
    x = torch.ones(4)
    for results in (lambda: [x], lambda: [x.new_empty(8)[:4]], lambda: [y := x.new_empty(4), y.view(2, 2)]):
        found, of = noted([x], results)
        assert found.void is None
        assert found.repeated(of) is None


def test_what_is_made_to_stay_is_no_part_of_a_call() -> None:
    def run() -> list[Tensor]:
        with unnoted():
            torch.ones(3).sort()
        return []

    found, _ = noted([torch.ones(1)], run)
    assert found.void is None
    assert found.form() == ((), ())


def test_where_something_fails_work_is_left_out_and_others_get_what_they_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, fails = [], [False]

    def failing(_: list[int]) -> None:
        if fails[0]:
            raise RuntimeError("out of something")

    functions = Memory(*(lambda *_, name=name: asked.append(name) for name in ("copy", "copy rows", "zero")))
    monkeypatch.setattr(recording, "memory_functions", lambda: functions)

    def run() -> list[Tensor]:
        ask("fails", failing)
        x.zero_()
        ask("for others", lambda _: asked.append("for others"))
        return []

    x = torch.ones(4)
    found, results = noted([x], run)
    repeated = found.repeated(results)
    assert repeated is not None
    for fails[0], expected in ((False, ["zero", "for others"]), (True, ["for others"])):
        asked.clear()
        _, failure = repeat(repeated, [x])
        assert asked == expected
        assert (str(failure) == "out of something") is fails[0]


def test_copies_zeros_and_roundings_are_asked_for_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    functions = Memory(*(lambda *of, name=name: asked.append((name, *of)) for name in ("copy", "copy rows", "zero")))
    monkeypatch.setattr(recording, "memory_functions", lambda: functions)
    x = torch.ones(8, 4)

    def run() -> list[Tensor]:
        zeros, wide = x.new_zeros(4), x.new_empty(8, 6)
        wide[:, 2:].copy_(x)
        return [zeros, x.clone(), wide, x.to(torch.bfloat16)]

    with stand_in() as launches:
        found, results = noted([x], run)
        assert found.void is None
        repeated = found.repeated(results)
        assert repeated is not None
        launches.launches = []
        (zeros, clone, wide, _, _), failure = repeat(repeated, [x])
        assert failure is None
        assert len(launches.launches) == 1
    address = x.data_ptr()
    assert asked == [
        ("zero", zeros.data_ptr(), 16, STREAM),
        ("copy rows", (wide.data_ptr() + 8, 24, address, 16, 16, 8), STREAM),
        ("copy", clone.data_ptr(), address, 128, STREAM),
    ]
