"""Fine-tuning a Hugging Face folder: as Transformers' Trainer does on one device, from chats to answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from folders import write_folder
from launcher import CHECKOUT, environment, losses
from safetensors.torch import load_file, save_file
from test_chats import messages_of
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ringflash.errors import DataError, RankMismatchError
from ringflash.export import export
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.config.agreement import agree
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.corpus import streaming
from ringflash.training.corpus.training_data import read_data
from ringflash.training.engines.schedule import learning_rate
from ringflash.training.run.loop import train

STEPS = 6


def settings(folder, run, *overrides):
    return load(
        [
            f"model.path={folder / 'model'}",
            "data=chat",
            f"data.path={folder / 'chats.jsonl'}",
            f"data.cache_dir={folder / 'cache'}",
            f"run_dir={folder / run}",
            "logging=quiet",
            "train.seqlen=96",
            "train.global_batch=4",
            f"train.steps={STEPS}",
            "optimizer.lr=5e-3",
            "optimizer.eps=1e-4",
            "optimizer.warmup_steps=2",
            *overrides,
        ]
    )


def _tune(folder, run, *overrides):
    config = settings(folder, run, *overrides)
    check(config, torch.distributed.get_world_size())
    agree(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK_SEQUENCES", 5)  # so that streams of few chats have several blocks
        train(config, torch.device("cpu"))
    return losses(folder / run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    write_folder(folder / "model", tie_word_embeddings=True)
    draw = random.Random(0)
    rows = []
    for _ in range(90):
        sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
        rows.append({"messages": messages_of([(f"What is {a} and {b}?", f"It is {a + b}.") for a, b in sums])})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"It is {i}. " * (i % 9 + 1)}) for i in range(60))
    )
    return folder


@pytest.fixture(scope="module")
def tuned(pool, folder):
    """Losses of two ranks that share each sequence."""
    return pool(2).run(_tune, folder, "tuned", "checkpoint.every=3")[0]


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_tuned_folder_goes_on_with_a_longer_context_and_other_text(pool, folder, tuned, kind):
    rope = (f"model.rope_parameters.rope_type={kind}", "model.rope_parameters.factor=4", "train.seqlen=192")
    text = ("data.format=text", f"data.path={folder / 'texts.jsonl'}", "train.steps=1", "train.global_batch=2")
    start = f"checkpoint.weights={folder / 'tuned'}"
    pool(2).run(_tune, folder, f"longer-{kind}", start, *rope, *text, "engine=zero3", "optimizer.lr=1e-30")
    found = Checkpoint(folder / f"longer-{kind}" / "checkpoints" / "step-00000001")
    before = Checkpoint(folder / "tuned" / "checkpoints" / f"step-{STEPS:08}")
    assert found.state["model"]["huggingface"]["rope_parameters"]["rope_type"] == kind
    for name in before.sizes:
        if name.startswith("weight/"):
            assert torch.equal(found.read(name), before.read(name)), name


class _Steps(torch.utils.data.Dataset):
    """One step's chats each, as the recipe draws them, in rows of their own."""

    def __init__(self, config):
        samples = read_data(config).samples
        self.rows = [[row for _ in range(4) for row in _chats(samples.draw(True))] for _ in range(STEPS)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, step):
        return self.rows[step]


def _chats(packed):
    for start, stop in itertools.pairwise([0, *packed.ends]):
        yield torch.from_numpy(packed.input_ids[start:stop]), torch.from_numpy(packed.labels[start:stop])


def _padded(steps):
    (rows,) = steps
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = (list(column) for column in zip(*rows, strict=True))
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
    }


def test_two_ranks_learn_what_transformers_trainer_learns_on_one_device(folder, tuned):
    config = settings(folder, "trainer")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rates = config.optimizer
    groups = [
        {"params": [x for x in model.parameters() if x.dim() > 1], "weight_decay": rates.weight_decay},
        {"params": [x for x in model.parameters() if x.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=rates.lr, betas=(rates.beta1, rates.beta2), eps=rates.eps)
    arguments = TrainingArguments(
        folder / "trainer",
        max_steps=STEPS,
        per_device_train_batch_size=1,
        logging_steps=1,
        max_grad_norm=rates.clip,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=_Steps(config),
        data_collator=_padded,
        optimizers=(adam, LambdaLR(adam, lambda step: learning_rate(rates, step, STEPS) / rates.lr)),
    )
    trainer.train()
    expected = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert tuned == pytest.approx(expected, rel=2e-4, abs=1e-4)  # it logs four digits
    run = Checkpoint(folder / "tuned" / "checkpoints" / f"step-{STEPS:08}")
    for name, weight in model.named_parameters():
        found = run.read(f"weight/model.{name}")
        assert (found - weight).abs().max() < 2e-4 * weight.abs().max(), name


@pytest.mark.parametrize(
    "use",
    [
        ["engine=zero3", "train.sequence_degree=1"],
        ["engine=zero2", "train.micro_batch=2", "attention.partition=contiguous"],
        ["attention.partition=balanced", "engine.memory=offload"],
    ],
    ids=["data_zero3", "micro_batches_zero2", "balanced"],
)
def test_how_ranks_are_used_does_not_change_the_losses(pool, folder, tuned, use):
    run = f"use-{zlib.crc32(repr(use).encode())}"
    assert pool(2).run(_tune, folder, run, *use)[0] == pytest.approx(tuned, rel=2e-4)
    found, expected = (json.loads((folder / name / "results.json").read_text()) for name in (run, "tuned"))
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-4)
    assert found["bits_per_byte"] is None


@pytest.fixture(scope="module")
def answering(pool, folder):
    """A folder of a chat model that two ranks have tuned until it answers."""
    long = ["train.steps=120", "optimizer.lr=1e-2", "logging.every=50", "optimizer.warmup_steps=10"]
    pool(2).run(_tune, folder, "answers", *long, timeout=200)
    export(folder / "answers", folder / "answering")
    return folder / "answering"


def test_a_chat_model_is_tuned_by_two_ranks_exported_loaded_and_answers(answering):
    model, tokenizer = (kind.from_pretrained(answering) for kind in (AutoModelForCausalLM, AutoTokenizer))
    chat = messages_of([("What is 2 and 3?", "")])[:1]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked, do_sample=False, max_new_tokens=20, pad_token_id=0)[
        0, asked["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(answer).startswith("It is ")
    assert tokenizer.decode(answer).endswith(".<|end|>")  # it has learned where a turn ends


def _sources(folder):
    texts = f"path: '{folder / 'texts.jsonl'}', weight: 1"
    chats = f"path: '{folder / 'chats.jsonl'}', weight: 3, format: chat, streaming: true"
    validation = f"validation: '{folder / 'chats.jsonl'}'"
    return ["data.path=null", "data.format=text", f"data.mixture=[{{{texts}}},{{{chats},{validation}}}]"]


def test_a_streamed_and_mixed_run_goes_on_from_its_middle_bit_for_bit(pool, folder):
    mixed = _sources(folder)
    whole = pool(2).run(_tune, folder, "mixed", "checkpoint.every=2", *mixed)[0]
    middle = f"checkpoint.resume={folder / 'mixed' / 'checkpoints' / 'step-00000004'}"
    rest = pool(2).run(_tune, folder, "mixed-rest", middle, *mixed)[0]
    assert rest == {step: loss for step, loss in whole.items() if step > 4}
    first, second = (Checkpoint(folder / run / "checkpoints" / "step-00000006") for run in ("mixed", "mixed-rest"))
    assert first.state["data"] == second.state["data"]
    name = "weight/model.model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first.read(name), second.read(name))
    other = pool(4).run(_tune, folder, "mixed-4", middle, "train.sequence_degree=2", "engine=zero1", *mixed)[0]
    assert other == pytest.approx(rest, rel=2e-4)


def test_the_commands_and_the_script_of_the_page_run(folder, answering, tmp_path):
    """From a model that answers already, which the commands train a little further."""
    page = (CHECKOUT / "docs" / "finetuning.md").read_text()
    commands, script = (re.search(rf"^```{kind}\n(.*?)^```", page, re.M | re.S)[1] for kind in ("bash", "python"))
    (tmp_path / "model").symlink_to(answering)
    (tmp_path / "chats.jsonl").symlink_to(folder / "chats.jsonl")
    (tmp_path / "launch").symlink_to(CHECKOUT / "launch")
    (tmp_path / "script.py").write_text(script)
    small = " train.seqlen=96 optimizer.lr=1e-3 train.epochs=0.5 optimizer.warmup_steps=1 logging=quiet"
    commands = commands.replace(" train.seqlen=4096", "").replace(" train.epochs=2 optimizer.lr=2e-5", small)
    commands = commands.replace("--nproc-per-node 4", "--nproc-per-node 2").replace("torchrun", "torchrun --standalone")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = {"cwd": tmp_path, "env": environment() | {"PATH": path}, "capture_output": True, "text": True}
    said = []
    for command in (["bash", "-e", "-c", commands], [sys.executable, "script.py"]):
        result = subprocess.run(command, timeout=200, **run)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    assert "tuned: the logits differ by" in said[0]
    assert said[1].startswith("It is")
    before, after = (load_file(path / "model.safetensors") for path in (answering, tmp_path / "tuned"))
    assert not all(torch.equal(before[name], after[name]) for name in before)


def _tune_where_folders_differ(folder, differ):
    mine = folder / f"{differ}-host{torch.distributed.get_rank()}"
    mine.mkdir()
    shutil.copytree(folder / "model", mine / "model")
    if torch.distributed.get_rank() == 1:
        if differ == "content":
            weights = load_file(mine / "model" / "model.safetensors")
            weights["model.norm.weight"] += 1
            save_file(weights, mine / "model" / "model.safetensors", metadata={"format": "pt"})
        else:
            (mine / "model" / "model.safetensors").unlink()
    with contextlib.chdir(mine):
        _tune(folder, differ, "model.path=model", "engine=zero3")


@pytest.mark.parametrize("differ", ["content", "absent"])
def test_ranks_that_read_different_weights_are_told(pool, folder, differ):
    first, second = pool(2).outcomes(_tune_where_folders_differ, folder, differ)
    assert isinstance(first.error, RankMismatchError)
    assert "ranks read different weights from model.path=model: " in str(first.error)
    assert isinstance(second.error, RankMismatchError if differ == "content" else DataError)
