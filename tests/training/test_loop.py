"""The whole loop on gloo workers: the same run however ranks are used, and its refusals."""

from __future__ import annotations

import pytest
import torch
from launcher import losses

from ringflash.errors import ArgumentError, CheckpointError, RingflashError
from ringflash.training.config import agree, check, load
from ringflash.training.loop import train


def _train(folder, run, *overrides):
    config = load(
        [
            "experiment=smoke",
            "logging=quiet",
            "logging.baselines=false",
            "train.steps=6",
            "train.validation_sequences=2",
            f"run_dir={folder / run}",
            f"data.cache_dir={folder / 'cache'}",
            *overrides,
        ]
    )
    check(config, torch.distributed.get_world_size())
    agree(config)
    train(config, torch.device("cpu"))
    return losses(folder / run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def curve(pool, folder):
    """Losses of two ranks that share each sequence."""
    return pool(2).run(_train, folder, "shared")[0]


USES = {
    "data": ["train.sequence_degree=1"],
    "larger_batches": ["train.micro_batch=2"],
    "contiguous": ["attention.partition=contiguous", "engine.activation_checkpointing=true"],
    "zero1": ["train.sequence_degree=1", "engine=zero1"],
}


@pytest.mark.parametrize("use", USES)
def test_how_ranks_are_used_does_not_change_the_losses(pool, folder, curve, use):
    other = pool(2).run(_train, folder, use, *USES[use])[0]
    assert len(curve) == 6
    assert other == pytest.approx(curve, rel=2e-4)


def test_another_seed_gives_another_run(pool, folder, curve):
    assert pool(2).run(_train, folder, "seed", "seed=1")[0] != pytest.approx(curve, rel=2e-4)


def test_one_batch_can_be_learned_by_heart(pool, folder):
    # Sequences of 64 tokens: twice as much as the model would learn of a text that changes.
    learned = pool(1).run(_train, folder, "heart", "debug=overfit", "train.steps=60", "train.seqlen=64")[0]
    assert learned[60] < 0.25 * learned[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_what_to_change(pool, folder):
    for outcome in pool(2).outcomes(_train, folder, "diverged", "optimizer.lr=1e30", "optimizer.clip=0"):
        assert isinstance(outcome.error, RingflashError)
        assert "optimizer.lr=1e+30" in str(outcome.error)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["checkpoint.resume=never"], ArgumentError, "already holds step-00000006; give another run_dir"),
        (["model.hidden_size=32"], CheckpointError, "is of another model: embed_tokens.weight"),
        (["data.max_bytes=300000"], CheckpointError, "documents"),
        (["train.seqlen=256"], CheckpointError, "seqlen=512, here it is 256"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_run_that_does_not_fit_its_checkpoint_is_refused_on_every_rank(pool, folder, curve, overrides, error, said):
    for outcome in pool(2).outcomes(_train, folder, "shared", *overrides):
        assert isinstance(outcome.error, error)
        assert said in str(outcome.error)


def test_a_text_shorter_than_a_sequence_is_refused(pool, folder):
    for outcome in pool(2).outcomes(_train, folder, "short", "train.seqlen=10000000"):
        assert "train.seqlen=10000000" in str(outcome.error)
