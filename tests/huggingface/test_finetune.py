"""launch/finetune.py over ranks trains what plain torch trains on one device, under every stage of ZeRO."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import zlib
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from finetuning import ADAMW, END, RECORDS, build, settings, write_folder
from torch.nn.functional import cross_entropy
from torch.utils.data import DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from ringflash.errors import ArgumentError, DataError
from ringflash.launch import finetune

CHECKOUT = Path(__file__).parents[2]
EPOCHS = 2
LOSS, WEIGHTS = 1e-5, 2e-5
"""Largest error: of the loss, of itself; of a weight, of the largest of its tensor."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_folder(folder)
    return folder


def _words(folder, config, *others):
    """The command line, with the JSON in a file of its own."""
    text = json.dumps(config)
    path = folder / f"ds_config_{zlib.crc32(text.encode())}.json"
    path.write_text(text)
    required = ["--model", folder / "model", "--data", folder / "data.jsonl", "--deepspeed", path]
    return [str(word) for word in [*required, "--epochs", EPOCHS, *others]]


# One device


def _batch_loss(model, tokenizer, records):
    """Mean over the targets of some documents, each in a row of its own."""
    losses = []
    for record in records:
        given = len(tokenizer(record["prompt"])["input_ids"]) if "prompt" in record else 1
        text = record.get("prompt", "") + record.get("completion", record.get("text"))
        ids = torch.tensor([*tokenizer(text)["input_ids"], END])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(cross_entropy(logits, ids[1:], reduction="none")[given - 1 :])
    return torch.cat(losses).mean()


@lru_cache
def _one_device(folder, data_ranks, accumulation):
    """Losses and weights of plain torch: a step is the mean over its batches of each batch's mean."""
    model = build("eager")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = settings(1)
    micro, clip = config["train_micro_batch_size_per_gpu"], config["gradient_clipping"]
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    curve, clipped = [], 0
    for epoch in range(EPOCHS):
        rows = []  # of each data rank its batches
        for rank in range(data_ranks):
            sampler = DistributedSampler(RECORDS, data_ranks, rank)
            sampler.set_epoch(epoch)
            order = [RECORDS[i] for i in sampler]
            rows.append([order[i : i + micro] for i in range(0, len(order), micro)])
        for begin in range(0, len(rows[0]), accumulation):
            batches = [batch for row in rows for batch in row[begin : begin + accumulation]]
            loss = torch.stack([_batch_loss(model, tokenizer, batch) for batch in batches]).mean()
            loss.backward()
            clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
    assert 0 < clipped < len(curve)  # of each kind, or a gradient of another scale would not be seen
    return curve, {name: weight.detach() for name, weight in model.named_parameters()}


def _assert_trained(curve, saved, expected):
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected[0]), rtol=LOSS, atol=0)
    model = AutoModelForCausalLM.from_pretrained(saved)
    for name, weight in model.named_parameters():
        largest = expected[1][name].abs().max().item()
        torch.testing.assert_close(
            weight, expected[1][name], rtol=0, atol=WEIGHTS * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


# Over ranks


def _finetune(words):
    return finetune.finetune(finetune.parse(words), torch.device("cpu"))


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_sequence_ranks_train_as_one_device_does(pool, folder, tmp_path, stage, offload):
    words = _words(folder, settings(stage, offload), "--save", tmp_path)
    for curve in pool(2).run(_finetune, words):
        _assert_trained(curve, tmp_path, _one_device(folder, 1, 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_data_and_sequence_ranks_together_train_as_one_device_does(pool, folder, tmp_path, stage):
    config = settings(stage, gradient_accumulation_steps=2)
    words = _words(folder, config, "--sequence-size", 2, "--save", tmp_path)
    for curve in pool(4).run(_finetune, words):
        _assert_trained(curve, tmp_path, _one_device(folder, 2, 2))


def test_train_batch_size_counts_sequences_where_the_json_says_how_many_ranks_share_one(pool, folder, tmp_path):
    config = settings(2, train_batch_size=4, sequence_parallel_size=2)
    del config["train_micro_batch_size_per_gpu"]
    words = _words(folder, config, "--sequence-size", 2, "--save", tmp_path)
    for curve in pool(4).run(_finetune, words):
        _assert_trained(curve, tmp_path, _one_device(folder, 2, 1))


def test_recomputed_layers_change_nothing(pool, folder, tmp_path):
    words = _words(folder, settings(3), "--gradient-checkpointing", "--save", tmp_path)
    for curve in pool(2).run(_finetune, words):
        _assert_trained(curve, tmp_path, _one_device(folder, 1, 1))


def test_random_weights_are_drawn_for_the_config_of_a_folder(pool, folder, tmp_path):
    words = _words(folder, settings(3), "--random-weights", "--save", tmp_path)
    curve, same = pool(2).run(_finetune, words)
    assert curve == same
    assert curve[0] == pytest.approx(math.log(END + 1), rel=0.02)  # it guesses
    assert curve[0] != pytest.approx(_one_device(folder, 1, 1)[0][0], rel=1e-4)  # and is not the folder's
    assert curve[-1] < curve[0]


def test_torchrun_starts_it(folder, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, CHECKOUT / "launch/finetune.py", *_words(folder, settings(2))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", result.stdout, flags=re.MULTILINE)]
    torch.testing.assert_close(torch.tensor(shown), torch.tensor(_one_device(folder, 1, 1)[0]), rtol=1e-4, atol=0)


# What it refuses


def _refused(words):
    with pytest.raises(ArgumentError) as caught:
        _finetune(words)
    return str(caught.value)


def test_wrong_arguments_are_named_before_anything_is_loaded(pool, folder, tmp_path):
    for sizes in pool(2).run(_refused, _words(folder, settings(1), "--sequence-size", 3)):
        assert sizes == "--sequence-size 3 with 2 ranks; allowed are divisors of 2"
    without = {key: x for key, x in settings(1).items() if key != "optimizer"}
    for text in pool(2).run(_refused, _words(folder, without)):
        assert "optimizer is missing" in text
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for text in pool(2).run(_refused, _words(folder, settings(1), "--deepspeed", broken)):
        assert "broken.json: Expecting property name" in text


@pytest.mark.parametrize("line", ['{"prompt": "no completion"}', '{"text": ', '["text"]', '{"messages": []}'])
def test_a_line_that_is_no_document_is_named(folder, tmp_path, line):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n' + line + "\n")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: .*; allowed are objects with text"):
        list(finetune.read_examples(data, tokenizer, 100))


def test_long_documents_are_cut_and_pieces_without_targets_left_out(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = tmp_path / "book.txt"
    text.write_text("abc" * 20)
    pieces = list(finetune.read_examples(text, tokenizer, 25))
    assert [len(piece["input_ids"]) for piece in pieces] == [25, 25, 12]
    assert [i for piece in pieces for i in piece["input_ids"]] == [*tokenizer("abc" * 20)["input_ids"], END]
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"prompt": "p" * 30, "completion": "c" * 9}) + "\n")
    pieces = list(finetune.read_examples(chat, tokenizer, 20))
    assert [sum(label != -100 for label in piece["labels"]) for piece in pieces] == [9]
