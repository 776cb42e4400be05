"""Labels: what torch's cross entropy refuses is refused by name and value, and integers of any width never wrap."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from hypothesis import given
from hypothesis import strategies as st

from ringflash import Sharding, shard_batch
from ringflash.errors import ArgumentError
from ringflash.loss import cross_entropy, cross_entropy_sum
from ringflash.parallel.labels import DTYPES

VOCABULARY = 11
IDS = [dtype for dtype in DTYPES if dtype != torch.int64]


def _activations(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, 4, generator=generator), torch.randn(VOCABULARY, 4, generator=generator)


any_label = st.one_of(
    st.integers(0, VOCABULARY - 1), st.just(-100), st.sampled_from([-1, -200, VOCABULARY]), st.integers(-(2**40), 2**40)
)


@given(labels=st.lists(any_label, min_size=1, max_size=6))
@pytest.mark.parametrize("loss", [cross_entropy_sum, cross_entropy])
def test_the_loss_is_torchs_and_refuses_by_name_and_value_what_torchs_refuses(loss, labels):
    x, weight = _activations(len(labels))
    given = torch.tensor(labels)
    try:
        expected = F.cross_entropy(x @ weight.T, given, reduction="none")
    except IndexError:
        wrong = next(i for i, label in enumerate(labels) if label != -100 and not 0 <= label < VOCABULARY)
        with pytest.raises(ArgumentError) as refused:
            loss(x, weight, given)
        assert f"labels[{wrong}] is {labels[wrong]}; allowed are 0 to {VOCABULARY - 1}, and -100" in str(refused.value)
    else:
        torch.testing.assert_close(loss(x, weight, given).sum(), expected.sum())


@given(labels=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), dtype=st.sampled_from(IDS))
@pytest.mark.parametrize("loss", [cross_entropy_sum, cross_entropy])
def test_the_loss_takes_labels_of_any_width(loss, labels, dtype):
    x, weight = _activations(len(labels))
    assert torch.equal(loss(x, weight, torch.tensor(labels).to(dtype)), loss(x, weight, torch.tensor(labels)))


def test_compiled_code_asserts_by_name():
    x, weight = _activations(3)
    compiled = torch.compile(cross_entropy_sum, backend="aot_eager", fullgraph=True)
    labels = torch.tensor([2, -100, 10])
    torch.testing.assert_close(compiled(x, weight, labels), cross_entropy_sum(x, weight, labels))
    for wrong in (-1, VOCABULARY):
        with pytest.raises(RuntimeError, match="labels must be 0 to 10, or -100"):
            compiled(x, weight, torch.tensor([2, wrong, 10]))


@st.composite
def packed(draw, dtype):
    """Ids (1, S) of a dtype, its greatest among them, and document boundaries."""
    ids = draw(st.lists(st.integers(0, min(torch.iinfo(dtype).max, 2**40)), min_size=1, max_size=12))
    inner = draw(st.lists(st.integers(0, len(ids)), max_size=3))
    return ids, [0, *sorted(inner), len(ids)]


@given(data=st.data(), dtype=st.sampled_from(DTYPES), ranks=st.integers(1, 4))
def test_ids_of_any_width_give_the_labels_of_int64(data, dtype, ranks):
    ids, bounds = data.draw(packed(dtype))
    expected = [-100 if i + 1 in {*bounds, len(ids)} else ids[i + 1] for i in range(len(ids))]
    narrow = torch.tensor(ids).to(dtype)[None]
    found: dict[int, int] = {}
    for rank in range(ranks):
        part = shard_batch({"input_ids": narrow, "cu_seqlens": bounds}, rank=rank, ranks=ranks)
        held = part["sharding"].spans()[rank]
        places = [place for start, stop in held for place in range(start, stop)]
        assert part["input_ids"].tolist() == [[ids[place] for place in places]]
        found |= dict(zip(places, part["labels"][0].tolist(), strict=True))
    assert [found[place] for place in range(len(ids))] == expected


@given(data=st.data())
def test_a_batch_is_refused_for_labels_that_a_loss_would_refuse_and_for_no_others(data):
    labels = data.draw(st.lists(any_label, min_size=1, max_size=8))
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, len(labels)), min_size=1, max_size=3)))]  # or tokens behind
    targets = [i for i in range(bounds[-1]) if i not in bounds]
    wrong = next((i for i in targets if labels[i] < 0 and labels[i] != -100), None)
    batch = {"input_ids": torch.zeros(1, len(labels), dtype=torch.int64), "labels": torch.tensor([labels])}
    if wrong is None:
        shard_batch(batch | {"cu_seqlens": bounds})
    else:
        with pytest.raises(ArgumentError) as refused:
            shard_batch(batch | {"cu_seqlens": bounds})
        assert f"labels[0, {wrong}] is {labels[wrong]}; allowed are 0 and more, and -100" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint64, torch.complex64])
def test_what_is_no_integer_that_int64_holds_is_refused_by_name(dtype):
    x, weight = _activations(3)
    wrong, right = torch.ones(1, 3).to(dtype), torch.ones(1, 3, dtype=torch.int64)
    for name, call in (
        ("input_ids", lambda: shard_batch({"input_ids": wrong})),
        ("labels", lambda: shard_batch({"input_ids": right, "labels": wrong})),
        ("labels", lambda: Sharding(seqlen=3).labels(wrong)),
        ("labels", lambda: cross_entropy_sum(x, weight, wrong[0])),
    ):
        with pytest.raises(ArgumentError, match=f"{name} is {dtype}; allowed are int64 and "):
            call()


@pytest.mark.parametrize("given", [[[1, 2, 3]], None, (1, 2)])
def test_what_is_no_tensor_is_refused_by_name(given):
    with pytest.raises(ArgumentError, match=f"input_ids is a {type(given).__name__}; allowed is a tensor of integers"):
        shard_batch({"input_ids": given})


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_batch_of_no_tokens_is_a_batch(ranks):
    for rank in range(ranks):
        part = shard_batch({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, rank=rank, ranks=ranks)
        assert {tuple(part[name].shape) for name in ("input_ids", "labels", "position_ids")} == {(2, 0)}


def test_a_batch_of_no_sequences_is_refused_by_name():
    with pytest.raises(ArgumentError, match=r"input_ids \(0, 5\) .* of one sequence and more"):
        shard_batch({"input_ids": torch.zeros(0, 5, dtype=torch.int64)})


WRONG_ON_A_GPU = """
import torch
from ringflash.loss import cross_entropy_sum
x, weight, labels = torch.randn(5, 4, device="cuda"), torch.randn(11, 4, device="cuda"), torch.arange(5, device="cuda")
torch.cuda.set_sync_debug_mode("error")
right = cross_entropy_sum(x, weight, labels)
wrong = cross_entropy_sum(x, weight, labels.masked_fill(labels == 3, {label}))
torch.cuda.set_sync_debug_mode("default")
print("computed", flush=True)
print(float(wrong))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("label", [-1, -200, VOCABULARY])
def test_a_gpu_asserts_by_name_and_is_not_waited_for(label):
    script = [sys.executable, "-c", WRONG_ON_A_GPU.format(label=label)]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "computed\n", ended.stdout + ended.stderr
    assert "labels must be 0 to 10, or -100" in ended.stderr
    assert "device-side assert" in ended.stderr
