"""Configuration: every group composes, and whatever is wrong is refused by its key's name before training starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException

import ringflash.configs.schema
from ringflash.configs.schema import Config, entries
from ringflash.errors import ArgumentError, RankMismatchError
from ringflash.training.config.agreement import agree
from ringflash.training.config.checks import check
from ringflash.training.config.composing import groups, load, sweep
from ringflash.training.config.derived import accumulation, compute_dtype, vocabulary

FOLDER = Path(ringflash.configs.schema.__file__).parent
FILES = sorted(FOLDER.glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_file_of_every_group_composes_to_values_that_pass(file):
    config = load([f"{file.parent.name}={file.stem}"])
    assert isinstance(config, Config)
    check(config, world_size=1)


def test_the_default_is_the_main_job():
    config = load()
    check(config, world_size=2)
    assert config.train.seqlen >= 4096
    assert config.data.path is None
    assert accumulation(config, world_size=2) == config.train.global_batch


def _message(error):
    """What Hydra shows: the error and its cause."""
    return f"{error}\n{error.__cause__}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=3", "model.layers"),
        ("modle=tiny", "modle"),
        ("model=huge", "model/huge"),
        ("train.steps=many", "train.steps"),
        ("model.hidden_size=1.5", "model.hidden_size"),
        ("train.steps=null", "train.steps"),
        ("model.rope_scaling.factr=2", "model.rope_scaling.factr"),
        ("model._target_=os.system", "model._target_"),
        ("_target_=os.system", "_target_"),
        ("+model.layers=3", "model.layers"),
        ("+model._target_=os.system", "model._target_"),
        ("+_target_=os.system", "_target_"),
        ("+extra.key=1", "extra"),
        ("++train.stepz=1", "train.stepz"),
    ],
)
def test_wrong_keys_and_types_are_refused_by_name(override, said):
    with pytest.raises((HydraException, ArgumentError)) as caught:
        load([override])
    assert said in _message(caught.value)


def test_a_sweep_is_every_combination_of_several_values():
    assert sweep(["seed=0", "train.steps=1,2", "+debug=overfit,short"]) == [
        ["seed=0", f"train.steps={steps}", f"+debug={debug}"] for steps in (1, 2) for debug in ("overfit", "short")
    ]
    assert len(sweep(["engine=glob(zero*)", "seed=range(2)"])) == 6
    with pytest.raises(ArgumentError, match=r"optimizer\.lr=interval\(0,1\) has no end"):
        sweep(["optimizer.lr=interval(0,1)"])


def test_values_may_be_taken_from_other_keys_and_from_what_hydra_knows():
    config = load(["seed=3", "name=lr-${optimizer.lr}", "run_dir=runs/${hydra:job.name}/${seed}"])
    assert (config.name, config.run_dir) == ("lr-0.0015", "runs/train/3")


def test_the_groups_are_the_folders_with_their_files():
    listed = [f"{group}={file}" for group, files in groups().items() for file in files]
    assert listed == [f"{file.parent.name}={file.stem}" for file in FILES]


def test_no_file_names_code_to_run():
    assert FILES
    for file in [*FILES, FOLDER / "config.yaml"]:
        assert "_target_" not in file.read_text()


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (["engine.name=fsdp"], 1, "engine.name='fsdp'; allowed are ddp, zero1, zero2, zero3"),
        (["engine.precision=fp8"], 1, "engine.precision='fp8'"),
        (["device=tpu"], 1, "device='tpu'; allowed are auto, cuda, cpu"),
        (["attention.mask=none"], 1, "attention.mask='none'"),
        (["attention.partition=striped"], 1, "attention.partition='striped'"),
        (["model.head_dim=0"], 1, "model.head_dim=0; allowed are 1 and more"),
        (["seed=-1"], 1, "seed=-1; allowed are 0 and more"),
        (["train.steps=0"], 1, "train.steps=0; allowed are 1 and more"),
        (["train.sequence_degree=0"], 1, "train.sequence_degree=0"),
        (["optimizer.clip=-1"], 1, "optimizer.clip=-1.0; allowed are 0 and more"),
        (["optimizer.lr=0"], 1, "optimizer.lr=0.0; it must be positive"),
        (["optimizer.beta2=1"], 1, "optimizer.beta2=1.0"),
        (["train.sequence_degree=2"], 3, "train.sequence_degree=2 does not divide the 3 ranks"),
        (["train.sequence_degree=8"], 4, "train.sequence_degree=8 does not divide the 4 ranks"),
        (["train.sequence_degree=1"], 4, "train.global_batch=1 is not divisible by train.micro_batch=1 x 4"),
        (["train.global_batch=6", "train.micro_batch=4"], 2, "train.global_batch=6 is not divisible"),
        (["attention=chunked", "train.global_batch=2", "train.micro_batch=2"], 1, "train.micro_batch=2 must be 1"),
        (["train.seqlen=3"], 4, "train.seqlen=3 is shorter than the 4 ranks"),
        (["model.num_attention_heads=5"], 1, "model.num_attention_heads=5 is not divisible"),
        (["model.num_key_value_heads=3"], 1, "model.num_key_value_heads=3"),
        (["model.rope_scaling.factor=0"], 1, "model.rope_scaling="),
        (["model.head_dim=33"], 1, "model.head_dim=33"),
        (["seed=18446744073709551616"], 1, "seed=18446744073709551616; allowed are 0 up to, not including, 2^64"),
        (["timeout=0"], 1, "timeout=0.0; it must be positive"),
        (["timeout=inf"], 1, "timeout=inf; allowed are finite numbers"),
        (["train.seqlen=1"], 1, "train.seqlen=1; allowed are 2 and more"),
        (["attention.kernel=cuda"], 1, "attention.kernel='cuda'; allowed are auto, reference, blockwise, triton"),
        (["attention.kernel=hopper", "device=cpu"], 1, "attention.kernel='hopper' cannot run: "),
        (["optimizer.eps=0"], 1, "optimizer.eps=0.0; it must be positive"),
        (["optimizer.weight_decay=nan"], 1, "optimizer.weight_decay=nan; allowed are finite numbers"),
        (["optimizer.clip=inf"], 1, "optimizer.clip=inf; allowed are finite numbers"),
        (["model.rope_theta=-1"], 1, "model.rope_theta=-1.0; it must be positive"),
        (["model.rms_norm_eps=0"], 1, "model.rms_norm_eps=0.0; it must be positive"),
        (["model.rope_scaling.low_freq_factor=nan"], 1, "model.rope_scaling.low_freq_factor=nan; allowed are finite"),
        (
            ["model.rope_scaling.original_max_position_embeddings=0"],
            1,
            "model.rope_scaling.original_max_position_embeddings=0; allowed are 1 and more",
        ),
        (["model.vocab_size=256"], 1, "model.vocab_size=256; data.tokenizer=bpe needs 257 and more"),
        (["model.vocab_size=256", "data=bytes"], 1, "model.vocab_size=256; data.tokenizer=bytes needs 257 and more"),
        (["data.vocab_size=256"], 1, "data.vocab_size=256; data.tokenizer=bpe needs 257 and more"),
        (["data.max_bytes=0"], 1, "data.max_bytes=0; allowed are 1 and more"),
        (["data.validation_fraction=0"], 1, "data.validation_fraction=0.0; it must be positive"),
        (["checkpoint.resume=nowhere"], 1, "checkpoint.resume=nowhere: no such folder; allowed are auto, never and a"),
        (["checkpoint.resume=/"], 1, "checkpoint.resume=/: no manifest.json in it; allowed are auto, never and a"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_values_that_cannot_work_are_refused_by_name(overrides, ranks, said):
    config = load(overrides)
    with pytest.raises(ArgumentError) as caught:
        check(config, ranks)
    assert said in str(caught.value)


def test_values_that_other_values_leave_unused_are_not_refused():
    check(load(["data=bytes", "data.vocab_size=1", "data.max_bytes=null"]), 1)
    check(load(["data.tokenizer=folder", "data.vocab_size=1", "model.vocab_size=100"]), 1)


def test_a_folder_that_may_be_a_checkpoint_is_not_refused(tmp_path):
    (tmp_path / "manifest.json").touch()  # its contents are checked by the rank that reads them
    for resume in ("auto", "never", tmp_path):
        check(load([f"checkpoint.resume={resume}"]), 1)


MEET_OTHER_VALUES = {
    "data.vocab_size",  # counts for a BPE only
    "model.rope_scaling.factor",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
}


def test_every_number_says_its_bounds_and_every_bound_is_one_that_is_checked():
    for key, value, bounds in entries(load()):
        assert bounds.keys() <= {"choices", "at_least", "positive", "share", "bits"}, key
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert bounds or key in MEET_OTHER_VALUES, key


@pytest.mark.parametrize(
    ("capability", "dtype"), [(None, torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16)]
)
def test_auto_precision_is_bfloat16_on_gpus_that_compute_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # emulated, if need be
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert compute_dtype(load()) == dtype
    assert compute_dtype(load(["device=cpu"])) == torch.float32
    assert compute_dtype(load(["engine.precision=bf16"])) == torch.bfloat16
    assert compute_dtype(load(["engine.precision=fp32"])) == torch.float32


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    tiny = load().model
    assert vocabulary(tiny, 257) == 320
    with pytest.raises(ArgumentError, match=r"model\.vocab_size=256 is less than the 257 tokens"):
        vocabulary(dataclasses.replace(tiny, vocab_size=256), 257)


def _agree_but_for(rank, key, value):
    import torch.distributed as dist

    agree(load([f"{key}={value}"] if dist.get_rank() == rank else []))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_other_configurations_are_named_on_every_rank(pool, rank):
    default = load().train.micro_batch
    said = f"rank 1 was started with train.micro_batch={7 if rank else default}, rank 0 with train.micro_batch="
    for outcome in pool(2).outcomes(_agree_but_for, rank, "train.micro_batch", 7):
        assert isinstance(outcome.error, RankMismatchError)
        assert said in str(outcome.error)
    pool(2).run(_agree_but_for, 0, "train.micro_batch", default)


def _agree_on_another_gpu(rank):
    import torch.distributed as dist

    from ringflash.training.config import agreement

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(agreement, "compute_dtype", lambda config: torch.bfloat16)
        agree(load())


def test_ranks_whose_gpus_make_another_precision_of_auto_are_named(pool):
    for outcome in pool(2).outcomes(_agree_on_another_gpu, 1):
        assert isinstance(outcome.error, RankMismatchError)
        assert "rank 1 was started with engine.precision of its GPU=torch.bfloat16, rank 0 with" in str(outcome.error)
