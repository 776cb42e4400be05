"""docs/benchmarks/timeline.py: what it makes of Chrome traces, and what it notes for them."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs/benchmarks"))

import timeline
import timeline_trace
from timeline_trace import Event, Pass, gaps, on_one_clock, read

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.kernels.select import select

TORCHS = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >(int)"
)
NCCLS = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


class Trace:
    """A Chrome trace as torch.profiler writes it, made by hand."""

    def __init__(self, base: int = 0, shift: float = 0.0, **notes: object) -> None:
        self.events: list[dict] = []
        self._base, self._shift, self._notes = base, shift, notes

    def add(self, cat: str, name: str, begin: float, end: float, **args: object) -> None:
        """An event."""
        ts = begin + self._shift
        self.events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": end - begin, "args": args})

    def kernel(self, name: str, asked: float, begin: float, end: float) -> None:
        """A kernel, and the host's launch of it."""
        number = len(self.events)
        self.add("cuda_runtime", "cudaLaunchKernel", asked, asked + 1, correlation=number)
        self.add("kernel", name, begin, end, correlation=number, stream=7)

    def copy(self, begin: float, end: float, source: int, target: int, nbytes: int = 1 << 20) -> None:
        """A copy by a copy engine, of which the host's side is not seen."""
        args = {"device": target} if source == target else {"fromDevice": source, "toDevice": target}
        self.add("gpu_memcpy", "Memcpy", begin, end, bytes=nbytes, correlation=10**6, **args)

    def whole(self) -> dict:
        """What is in the file."""
        notes = {"ringflash": self._notes} if self._notes else {}
        return {"traceEvents": self.events, "baseTimeNanoseconds": self._base} | notes


def trace_of_two_calls(**where: object) -> dict:
    """Forward: ranks meet at 100; kernels from 110 to 200, 260 to 300. Backward: they meet at 1,100."""
    stages = {"forward": [0, 1], "backward": [0, 1]}
    trace = Trace(stages=stages, title="some case", sharding="some plan", host={"forward": 7, "backward": 9}, **where)
    trace.kernel("attend_kernel", 0, 1, 2)  # of calls before
    trace.add("user_annotation", "lead of forward", 10, 20)
    trace.kernel("spin_kernel(long)", 11, 12, 90)
    trace.kernel(NCCLS, 15, 90, 100)
    trace.add("user_annotation", "forward", 20, 45)
    trace.kernel("attend_kernel", 25, 110, 200)
    trace.copy(205, 250, source=1, target=0)
    trace.copy(252, 253, source=1, target=0, nbytes=4)
    trace.kernel("attend_kernel", 230, 260, 300)
    trace.add("user_annotation", "lead of backward", 1000, 1010)
    trace.kernel(NCCLS, 1005, 1050, 1100)
    trace.add("user_annotation", "backward", 1010, 1060)
    trace.kernel(TORCHS, 1015, 1100, 1120)
    trace.copy(1100, 1110, source=0, target=0)
    for begin in (1120, 1140, 1160, 1180):
        trace.kernel("dquery_kernel" if begin % 40 == 0 else "dkey_kernel", 1020, begin, begin + 20)
    return trace.whole()


def test_calls_begin_when_ranks_have_met_and_hold_what_came_behind() -> None:
    forward, backward = read(trace_of_two_calls()).values()
    assert (forward.zero, forward.host) == (100, 25)
    assert [(x.kind, x.begin, x.end, x.launched, x.stage) for x in forward.events] == [
        ("attention", 10, 100, -75, 0),
        ("copy", 105, 150, None, None),
        ("flag", 152, 153, None, None),
        ("attention", 160, 200, 130, 1),
    ]
    assert forward.events[1].name == "copy of 1 MiB from GPU 1 to 0"
    assert (backward.zero, backward.host, backward.end) == (1100, 50, 100)
    assert {x.name: x.kind for x in backward.events} == {
        "vectorized_elementwise_kernel FillFunctor": "other kernel", "copy of 1 MiB": "own copy",
        "dquery_kernel": "attention", "dkey_kernel": "attention",
    }  # fmt: skip
    assert [x.stage for x in backward.events if x.kind == "attention"] == [0, 0, 1, 1]  # two kernels a launch


def test_launches_that_cannot_be_told_apart_have_no_stage() -> None:
    trace = trace_of_two_calls()
    trace["ringflash"]["stages"]["forward"] = [0, 1, 2]
    assert {x.stage for x in read(trace)["forward"].events} == {None}


def test_a_trace_of_something_else_is_refused_by_what_it_lacks() -> None:
    trace = trace_of_two_calls()
    trace["traceEvents"] = [x for x in trace["traceEvents"] if x["name"] != "lead of backward"]
    with pytest.raises(ValueError, match="no annotation 'lead of backward'"):
        read(trace)
    trace = trace_of_two_calls()
    trace["traceEvents"] = [x for x in trace["traceEvents"] if x["name"] != NCCLS]
    with pytest.raises(ValueError, match="nothing on the GPU under 'lead of backward'"):
        read(trace)


def test_a_gap_tells_what_stood_round_it_what_came_and_how_late_the_host_was() -> None:
    forward = read(trace_of_two_calls())["forward"]
    (first, second) = gaps(forward.events)
    assert (first.begin, first.end, first.late) == (100, 160, 30)
    assert (first.before, first.copy, first.after) == (forward.events[0], forward.events[1], forward.events[3])
    assert str(first) == (
        "60 at 100 between attend_kernel of stage 0 and attend_kernel of stage 1; copy of 1 MiB from GPU 1 to 0, begun "
        "at 105, ended 10 before its end; the host was late by 30"
    )
    assert str(second) == "10 at 0 between the beginning and attend_kernel of stage 0"


@given(
    st.lists(st.tuples(st.integers(-20, 200), st.integers(1, 30), st.sampled_from(["attention", "copy"])), max_size=9)
)
def test_gaps_and_kernels_fill_the_time_of_a_call(drawn: list[tuple[int, int, str]]) -> None:
    events = [Event("x", kind, begin, begin + size) for begin, size, kind in drawn]
    busy = {t for x in events if x.kind == "attention" for t in range(int(x.begin), int(x.end)) if t >= 0}
    idle = [t for gap in gaps(events, least=1) for t in range(int(gap.begin), int(gap.end))]
    assert sorted([*busy, *idle]) == list(range(max(busy, default=-1) + 1))


def test_ranks_are_brought_to_one_clock() -> None:
    early, late = (Pass(zero, (Event("x", "copy", 5, 8, 1),), 0) for zero in (1000, 1003))
    (first, second), apart = on_one_clock([{"forward": late, "backward": early}, {"forward": early, "backward": late}])
    assert apart == {"forward": 3, "backward": 3}
    assert [(x["forward"].events[0].begin, x["forward"].events[0].launched) for x in (first, second)] == [
        (8, 4),
        (5, 1),
    ]
    assert first["backward"].events[0].end == 8
    same = [read(trace_of_two_calls(base=base, shift=-base / 1e3)) for base in (0, 5_000_000)]
    assert on_one_clock(same)[1] == {"forward": 0, "backward": 0}


def test_traces_are_drawn_and_told_of_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, base in enumerate((0, 20_000)):
        written = gzip.compress(json.dumps(trace_of_two_calls(base=base)).encode())
        (tmp_path / f"x-rank{rank}.json.gz").write_bytes(written)
    monkeypatch.setattr(sys, "argv", ["timeline.py", "--read", str(tmp_path / "x")])
    timeline.main()
    said = capsys.readouterr().out
    assert "ranks' clocks begin within 20 us (forward), 20 us (backward)" in said
    assert "forward: 220 us until the last rank is done" in said
    rows = [line.split() for line in said.splitlines() if line.lstrip()[:2] in ("0 ", "1 ")]
    assert rows[:2] == [
        ["0", "200", "59.1%", "130", "0", "45", "7"],
        ["1", "220", "59.1%", "130", "0", "45", "7"],
    ]
    assert "  rank 1: 60 at 120 between attend_kernel of stage 0" in said
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_case_that_the_suite_does_not_have_is_refused() -> None:
    assert timeline.case_of("documents", 131072).mean == 8192
    with pytest.raises(SystemExit, match="--case 'causal' --tokens 17: allowed are causal of 32768"):
        timeline.case_of("causal", 17)


def noted_and_launched(plan: str) -> tuple[dict[str, list[int]], dict[str, int]]:
    """What is noted of stages for a trace, and how many launches there were."""
    launched, kernels = {"attend": 0, "attend_backward": 0}, select("cpu", torch.float32, 8)
    right = {name: getattr(kernels, name) for name in launched}

    def counted(name: str):
        def launch(*arguments: object, **named: object) -> object:
            launched[name] += 1
            return right[name](*arguments, **named)

        return launch

    mask = Mask.causal()
    sharding = Sharding(mask, seqlen=600, cu_seqlens=[0, 150, 600], partition="contiguous", plan=plan)
    query, key, value = (torch.randn(1, sharding.tokens, 2, 8, requires_grad=True) for _ in range(3))
    try:
        for name in launched:
            setattr(kernels, name, counted(name))
        attention(query, key, value, sharding=sharding)[0].sum().backward()
    finally:
        for name, function in right.items():
            setattr(kernels, name, function)
    return timeline.stages_of(sharding, torch.device("cpu")), launched


@pytest.mark.parametrize("plan", ["ring", "direct-1"])
def test_every_launch_is_noted_with_its_stage(pool, plan: str) -> None:
    for noted, launched in pool(3).run(noted_and_launched, plan):
        assert len(noted["forward"]) == launched["attend"] > 0
        assert len(noted["backward"]) == launched["attend_backward"] > 0
    assert tuple(noted) == timeline_trace.PASSES
