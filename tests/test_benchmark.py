"""What the benchmarks count and choose; their timings need GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from ringflash.launch import benchmark
from ringflash.launch.benchmark_device import TURN, in_turn
from ringflash.launch.benchmark_features import features, ratios
from ringflash.launch.benchmark_kernels import Case, document_lengths
from ringflash.launch.benchmark_report import Row
from ringflash.launch.benchmark_ring import ways


@given(
    documents=st.lists(st.integers(1, 30), max_size=4),
    length=st.integers(1, 60),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 40),
)
def test_operations_are_counted_over_visible_pairs(documents, length, causal, window):
    length = sum(documents) or length
    window = window if causal else None
    case = Case("", 64, 1, 1, 1, length, causal, window, tuple(documents))
    intervals = [case.mask.key_interval(row) for row in range(length)]
    assert case.pairs == sum(min(stop, length) - max(start, 0) for start, stop in intervals)


@given(mean=st.integers(1, 5000), total=st.integers(1, 50_000))
def test_documents_fill_the_tokens(mean, total):
    lengths = document_lengths(mean, total)
    assert sum(lengths) == total
    assert min(lengths) >= 1


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["suite=nothing"], "suite=nothing: allowed are kernels, ring, tax, sdpa, prefill"),
        (["sweet=kernels"], "sweet=kernels: allowed for suite=kernels are suite=..., out=..., tokens=..."),
        (["suite=ring", "shrink=2"], "shrink=2: allowed for suite=ring are"),
        (["shrink=8", "suite=sdpa"], "shrink=8: allowed for suite=sdpa are"),
        (["tokens=512,many"], "tokens=512,many: allowed is whole numbers above 0, comma-separated"),
        (["repeats=0"], "repeats=0: allowed is a whole number above 0"),
        (["repeats=2,3"], "repeats=2,3: allowed is a whole number above 0"),
    ],
)
def test_wrong_options_are_refused_by_name(words, refused):
    with pytest.raises(SystemExit) as exit:
        benchmark.parse(words)
    assert str(exit.value).startswith(refused)


def test_options_are_read_by_their_types():
    words = ["suite=prefill", "tokens=512,1024", "repeats=3", "shrink=8", "out=a=b.json"]
    assert benchmark.parse(words) == benchmark.Options("prefill", "a=b.json", (512, 1024), "", 3, "", 8)


def test_features_are_held_against_what_their_pairs_and_bytes_say():
    found = {x.name: x for x in features()}
    assert len(found) == len(list(features()))
    window, dense = found["window 1023"], found["softcap 50"]
    seen = 1024 * 1025 / 2 + (16384 - 1024) * 1024
    assert window.operations("fwd", window.mask) == 4 * 32 * 128 * seen
    assert dense.operations("bwd", dense.mask) == 10 * 32 * 128 * 16384 * 16385 / 2
    blocks = found["16 random blocks of 128"]
    assert blocks.operations("fwd", blocks.mask) == 4 * 32 * 128 * 16384 * 16 * 128
    latent = found["MLA 192/128"]
    assert latent.operations("bwd", latent.mask) == 2 * 128 * (3 * 192 + 2 * 128) * 8192 * 8193 / 2
    short = found["window 128 with sinks, gpt-oss"]
    assert short.nbytes("fwd") == 32768 * 2 * 64 * (64 + 8 + 8 + 64)


def test_a_ratio_of_both_passes_is_of_all_their_work_and_time():
    def row(name, direction, milliseconds, tflops):
        return Row(name, "case", 1, direction, milliseconds, tflops)

    ours = [row("ringflash", "fwd", 1.0, 400.0), row("ringflash", "bwd", 4.0, 250.0)]
    theirs = [row("without", "fwd", 0.5, 800.0), row("without", "bwd", 2.0, 500.0)]
    assert ratios(ours + theirs) == [f"{'case':36s} {'without':24s} forward 0.50, both 0.50"]
    assert ratios(ours) == []


def test_what_is_chosen_a_plan_heads_and_each_way_between_are_timed():
    assert ways(2, ("zigzag",)) == {"zigzag": ("zigzag", None), "plan": ("zigzag", 1), "Ulysses": ("contiguous", 2)}
    of_eight = ways(8, ("balanced", "contiguous"))
    assert [*of_eight] == ["balanced", "contiguous", "plan", "Ulysses", "2 x 4", "4 x 2"]
    assert [head_ranks for _, head_ranks in of_eight.values()] == [None, None, 1, 8, 2, 4]


def test_implementations_take_turns_and_their_medians_count():
    order, times = [], {"fast": iter([1.0] * 2 + [0.5, 1.0, 0.5, 3.0, 0.5, 2.0]), "slow": iter([99.0] * 8)}

    def timer(name):
        return lambda calls: order.append((name, calls)) or next(times[name])

    found = in_turn({name: timer(name) for name in times}, rounds=3)
    assert found == {"fast": 2.0, "slow": 99.0}
    assert sorted(order[4:]) == [("fast", TURN)] * 6 + [("slow", 1)] * 6  # as many calls as fill a turn
    assert all(order[n] == order[n + 1] for n in range(4, 16, 2))  # one that warms up, one that counts
