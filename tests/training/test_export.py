"""`python -m ringflash.export`: what a run becomes loads in Transformers, and computes what the run does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from folders import write_folder
from launcher import CHECKOUT, environment
from safetensors.torch import load_file, save_file
from test_loop import _train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ringflash import export as exporting
from ringflash.errors import ArgumentError, CheckpointError
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.corpus.tokenizer import load as load_tokenizer

TEXT = "def one(x):\n    return x + 1  # für alle\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def runs(pool, folder):
    """Runs of two ranks: of a folder, of the recipe's own model with two tokenizers."""
    small = ("train.steps=2", "data.max_bytes=60000")
    model = write_folder(folder / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "max_new_tokens": 7}))
    own = [f"model.{name}=0" for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
    own += ["model.num_attention_heads=0", "model.num_key_value_heads=0", "model=pretrained", "engine=zero3"]
    pool(2).run(_train, folder, "folder", *small, *own, f"model.path={model}")
    pool(2).run(_train, folder, "bpe", *small, "model.rope_scaling.factor=4", "model.tie_word_embeddings=false")
    yarn = [f"model.rope_scaling.{key}" for key in ("rope_type=yarn", "factor=4", "original_max_position_embeddings=8")]
    pool(2).run(_train, folder, "bytes", *small, "data=bytes", *yarn)
    return folder


def test_a_fine_tuned_folder_is_exported_loaded_by_transformers_and_generates(runs, tmp_path):
    command = [sys.executable, "-m", "ringflash.export", runs / "folder", tmp_path / "out", "--shard-size", "20KB"]
    result = subprocess.run(command, cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "of the largest from those of" in result.stdout
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    run = Checkpoint(runs / "folder" / "checkpoints" / "step-00000002")
    start = AutoModelForCausalLM.from_pretrained(runs / "model")
    for name, weight in model.named_parameters():
        trained = run.read(f"weight/model.{name}")
        assert torch.equal(weight, trained.bfloat16()), name
        assert not torch.equal(trained, start.get_parameter(name)), name
    tokenizer, first = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", runs / "model"))
    assert tokenizer.chat_template == first.chat_template
    assert model.generation_config.eos_token_id == [2, 0]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_tensors="pt")
    answer = model.generate(**chat, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer.shape[1] == chat["input_ids"].shape[1] + 7


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_the_recipes_own_model_and_tokenizer_become_a_llama_of_transformers(runs, tmp_path, name):
    assert exporting.export(runs / name, tmp_path / "out") < 1e-5
    ours, theirs = load_tokenizer(runs / name / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = ours.encode([TEXT.encode()])[0].tolist()
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.bos_token_id == ours.separator
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.bos_token_id == ours.separator
    assert model.generate(torch.tensor([[ours.separator, *ids]]), max_new_tokens=3, do_sample=False).shape[1] > len(ids)


def test_logits_that_differ_from_the_runs_are_an_error(runs, tmp_path, monkeypatch):
    def spoilt(model, out, **options):
        save_pretrained(model, out, **options)
        weights = load_file(out / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"] *= 1.1
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    save_pretrained = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoilt)
    with pytest.raises(CheckpointError, match=r"its logits differ by .* of the largest from those of the run"):
        exporting.export(runs / "bpe", tmp_path / "out")
    assert not list(tmp_path.iterdir())  # nothing that looks like a model is left


def test_what_cannot_be_exported_is_refused_by_name(pool, runs, tmp_path, capsys):
    (tmp_path / "there").write_text("")
    with pytest.raises(ArgumentError, match=r"there is there already; give a new folder"):
        exporting.export(runs / "bpe", tmp_path / "there")
    for size in ("abc", "0GB", "5", "-1GB"):
        with pytest.raises(ArgumentError, match=rf"--shard-size={size}; allowed are numbers with KB"):
            exporting.export(runs / "bpe", tmp_path / "out", size)
    with pytest.raises(ArgumentError, match=r"there/out: cannot write there: "):
        exporting.export(runs / "bpe", tmp_path / "there" / "out")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in it, nor is it one"):
        exporting.export(tmp_path, tmp_path / "out")
    pool(1).run(_train, tmp_path, "window", "attention=sliding_window", "train.steps=1", "data.max_bytes=60000")
    with pytest.raises(ArgumentError, match=r"attention.mask=sliding_window; a Llama of Transformers is causal"):
        exporting.export(tmp_path / "window", tmp_path / "out")
    with pytest.raises(SystemExit):
        exporting.main([str(tmp_path), str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("CheckpointError: ")
