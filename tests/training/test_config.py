"""Configuration: every group composes, and whatever is wrong is refused by its key's name before training starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import ringflash.configs.schema
from ringflash.configs.schema import Config, entries
from ringflash.errors import ArgumentError, RankMismatchError
from ringflash.training.config.agreement import agree
from ringflash.training.config.checks import check
from ringflash.training.config.composing import compose, groups, load, sweep
from ringflash.training.config.derived import accumulation, compute_dtype, vocabulary

FOLDER = Path(ringflash.configs.schema.__file__).parent
FILES = sorted(FOLDER.glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_file_of_every_group_composes_to_values_that_pass(file, tmp_path):
    (tmp_path / "config.json").touch()
    others = {
        "pretrained": [f"model.path={tmp_path}"],
        "finetune_long": [f"model.path={tmp_path}"],
        "chat": [f"data.path={tmp_path}", f"data.tokenizer={tmp_path}"],
    }
    config = load([f"{file.parent.name}={file.stem}", *others.get(file.stem, [])])
    assert isinstance(config, Config)
    check(config, world_size=1)


def test_the_default_is_the_main_job():
    config = load()
    check(config, world_size=2)
    assert config.train.seqlen >= 4096
    assert config.data.path is None
    assert accumulation(config, world_size=2) == config.train.global_batch


KEYS = [key for key, _, _ in entries(load())]
NODES = sorted({key.rpartition(".")[0] for key in KEYS} | {"model.rope_scaling"})
"""What holds keys; "" is the whole configuration."""


@pytest.mark.parametrize("sign", ["", "+", "++", "~"])
@given(
    node=st.sampled_from(NODES), name=st.from_regex(r"[a-z_]{3,12}", fullmatch=True), value=st.sampled_from(["x", "1"])
)
@example(node="model", name="folder", value="x")
@example(node="engine", name="_target_", value="os.system")
@settings(max_examples=8)
def test_a_key_that_does_not_exist_is_refused_by_its_name_and_never_advised_to_be_added(sign, node, name, value):
    key = f"{node}.{name}".lstrip(".")
    inside = [
        other[len(node) :].lstrip(".").split(".")[0] for other in KEYS if not node or other.startswith(f"{node}.")
    ]
    assume(name not in inside and not (not node and name in ("experiment", "debug", "hydra")))
    with pytest.raises(ArgumentError) as refused:
        load([f"{sign}{key}={value}"])
    assert str(refused.value) == f"{key} is no configuration key; allowed here are {', '.join(sorted({*inside}))}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=huge", "model=huge; allowed are llama3_1b, llama3_8b, pretrained, tiny"),
        ("model=3", "model=3; allowed are llama3_1b, llama3_8b, pretrained, tiny"),
        ("model=null", "model=null; allowed are llama3_1b, llama3_8b, pretrained, tiny"),
        ("model={path: x}", "model={path:x}; allowed are llama3_1b"),
        (
            "experiment=[smoke,none]",
            "experiment=none; allowed are finetune_long, llama3_8b_long, llama3_8b_million, smoke",
        ),
        ("train.steps.x=1", "train.steps.x is no configuration key; train.steps is a value"),
        ("model@x=tiny", "x is no configuration key; allowed here are attention"),
        ("=3", "=3 names no key; allowed are key=value and group=file"),
        (
            "data.mixture=[{path: x, weigth: 1}]",
            "data.mixture[...].weigth is no configuration key; allowed here are format",
        ),
    ],
)
def test_what_names_neither_a_key_nor_a_groups_file_is_refused_in_our_words(override, said):
    with pytest.raises(ArgumentError) as refused:
        load([override])
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "experiment/mine",
            "# @package _global_\nmodel: {folder: x}\n",
            "model.folder is no configuration key; allowed here",
        ),
        ("experiment/mine", "# @package _global_\ntrian: {steps: 1}\n", "trian is no configuration key; allowed here"),
        (
            "experiment/mine",
            "train: {steps: 1}\n",
            "experiment has no keys of its own; begin its file with '# @package",
        ),
        (
            "model/mine",
            "hidden_size: 8\nlayers: 3\n",
            "model.layers is no configuration key; allowed here are head_dim",
        ),
    ],
)
def test_a_key_of_a_file_that_does_not_exist_is_refused_in_the_same_words(tmp_path, file, text, said):
    (tmp_path / file).parent.mkdir()
    (tmp_path / f"{file}.yaml").write_text(text)
    with pytest.raises(ArgumentError) as refused:
        compose(["=".join(file.split("/"))], str(tmp_path))
    assert str(refused.value).startswith(said)


def test_files_within_folders_of_a_group_and_those_that_a_value_names_are_left_to_hydra(tmp_path, monkeypatch):
    (tmp_path / "model/own").mkdir(parents=True)
    (tmp_path / "model/own/mine.yaml").write_text("# @package model\nhidden_size: 24\n")
    assert compose(["model=own/mine"], str(tmp_path)).model.hidden_size == 24
    monkeypatch.setenv("SHAPE", "tiny")
    assert load(["model=${oc.env:SHAPE}"]) == load(["model=tiny"])


@pytest.mark.parametrize(
    ("override", "said"), [("train.steps=many", "train.steps"), ("model.hidden_size=1.5", "model.hidden_size")]
)
def test_values_of_the_wrong_type_are_refused_by_name(override, said):
    with pytest.raises(HydraException) as refused:
        load([override])
    assert said in f"{refused.value}\n{refused.value.__cause__}"  # Hydra shows both


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
        (["engine.name=fsdp"], 1, "engine.name='fsdp'; allowed are ddp, fsdp2, zero1, zero2, zero3"),
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
        (["attention.head_ranks=0"], 1, "attention.head_ranks=0"),
        (["attention.head_ranks=3"], 4, "attention.head_ranks=3 does not divide the 4 ranks that share a sequence"),
        (["attention.head_ranks=16"], 16, "attention.head_ranks=16 does not divide model.num_attention_heads="),
        (["train.sequence_degree=1"], 4, "train.global_batch=1 is not divisible by train.micro_batch=1 x 4"),
        (["train.global_batch=6", "train.micro_batch=4"], 2, "train.global_batch=6 is not divisible"),
        (["attention=chunked", "train.global_batch=2", "train.micro_batch=2"], 1, "train.micro_batch=2 must be 1"),
        (["train.seqlen=3"], 4, "train.seqlen=3 is shorter than the 4 ranks"),
        (["model.num_attention_heads=5"], 1, "model.num_attention_heads=5 is not divisible"),
        (["model.num_key_value_heads=3"], 1, "model.num_key_value_heads=3"),
        (["model.rope_scaling.factor=0"], 1, "model.rope_scaling.factor=0.0; it must be positive"),
        (["model.rope_scaling.rope_type=dynamic"], 1, "rope_type='dynamic'; allowed are linear, ntk, yarn, llama3"),
        (["model.rope_scaling.beta_fast=8"], 1, "beta_fast=8.0 means nothing to rope_type=llama3, which takes factor"),
        (["model.rope_scaling.high_freq_factor=1"], 1, "low_freq_factor=1.0 is not below high_freq_factor=1.0"),
        (
            ["model.rope_scaling.rope_type=yarn", "model.rope_scaling.beta_slow=64"],
            1,
            "beta_slow=64.0 is not below beta_fast=32.0",
        ),
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
        (
            ["checkpoint.resume=nowhere"],
            1,
            "checkpoint.resume=nowhere: no such folder; allowed are auto, last_good, nev",
        ),
        (["checkpoint.every=off"], 1, "checkpoint.every=off; allowed are never, 0 and more"),
        (["checkpoint.every=-1"], 1, "checkpoint.every=-1; allowed are never, 0 and more"),
        (["checkpoint.resume=/"], 1, "checkpoint.resume=/: no manifest.json in it; allowed are auto, last_good, nev"),
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
}


def test_every_number_says_its_bounds_and_every_bound_is_one_that_is_checked():
    for key, value, bounds in entries(load()):
        assert bounds.keys() <= {"choices", "at_least", "positive", "share", "bits", "words"}, key
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
