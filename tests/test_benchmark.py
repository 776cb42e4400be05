"""What the benchmarks count and choose; their timings need GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from ringflash.launch import benchmark
from ringflash.launch.benchmark_kernels import Case, document_lengths


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


@pytest.mark.parametrize("word", ["suite=nothing", "sweet=kernels"])
def test_wrong_options_are_refused_by_name(word):
    with pytest.raises(SystemExit, match=word):
        benchmark.parse([word])
