"""Batches made ahead: the same ones in the same order, and a checkpoint that knows only of those that were taken."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ringflash.training.corpus.batching import PackedBatches
from ringflash.training.corpus.documents import Documents
from ringflash.training.corpus.samples import EpochSamples
from ringflash.training.run.loader import ShardedBatches


def _packed() -> PackedBatches:
    lengths = np.array([40, 7, 90, 25])
    ends = lengths.cumsum()
    documents = Documents(
        tokens=np.arange(ends[-1], dtype=np.uint16),
        offsets=np.concatenate([[0], ends]),
        text=np.zeros(ends[-1], dtype=np.uint8),
        spans=np.stack([ends - lengths, ends], axis=1),
        token_bytes=None,
        identity="test",
    )
    return PackedBatches(EpochSamples(documents, seqlen=32, seed=3), batch=1)


def test_batches_come_in_order_and_are_made_in_another_thread() -> None:
    threads = []

    def shard(batch: dict) -> dict:
        threads.append(threading.get_ident())
        return batch

    batches, expected = ShardedBatches(_packed(), shard), _packed()
    for _ in range(6):
        assert batches.take()["input_ids"].equal(next(expected)["input_ids"])
        assert batches.state_dict() == expected.state_dict()
        assert batches.epoch == expected.epoch
    assert threading.get_ident() not in threads


def test_before_the_first_batch_the_state_is_the_one_that_was_loaded() -> None:
    packed = _packed()
    for _ in range(3):
        next(packed)
    resumed = _packed()
    resumed.load_state_dict(packed.state_dict())
    batches = ShardedBatches(resumed, lambda batch: batch)
    assert batches.state_dict() == packed.state_dict()
    assert batches.take()["input_ids"].equal(next(packed)["input_ids"])


def test_what_is_raised_while_a_batch_is_made_is_raised_where_it_is_taken() -> None:
    def shard(batch: dict) -> dict:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ShardedBatches(_packed(), shard).take()


def test_a_batch_that_was_looked_at_is_taken_next_and_not_counted_before() -> None:
    batches, expected = ShardedBatches(_packed(), lambda batch: batch), _packed()
    for _ in range(3):
        state = batches.state_dict()
        seen = batches.peek()
        assert batches.state_dict() == state
        assert batches.take() is seen
        assert seen["input_ids"].equal(next(expected)["input_ids"])


def test_time_is_waited_for_a_batch_that_is_not_ready_alone() -> None:
    ready = threading.Event()
    batches = ShardedBatches(_packed(), lambda batch: ready.wait(9) and batch)
    threading.Timer(0.3, ready.set).start()
    batches.take()
    first = batches.waited
    assert first > 0.2
    batches.peek()  # waits until the next one is ready, and this is no step's time
    batches.take()
    assert batches.waited - first < 0.2
