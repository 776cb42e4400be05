"""A run of the training recipe as a Hugging Face folder: `python -m ringflash.export RUN OUT`.

RUN is a run's folder, of which the newest checkpoint is taken, or one of its checkpoints. OUT gets config.json, the
tokenizer, and the weights in bfloat16 in sharded safetensors, for `AutoModelForCausalLM.from_pretrained(OUT)`. Last it
is loaded so, and its logits are compared with those of the recipe's own model. This takes host memory for the model in
fp32, and no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ringflash.configs.schema import LoraConfig, ModelConfig, RopeParametersConfig, RopeScalingConfig
from ringflash.errors import ArgumentError, CheckpointError, RingflashError
from ringflash.training.checkpoint.files import found_at
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.config.derived import TOKENIZER
from ringflash.training.corpus.tokenizer import BPETokenizer, ByteTokenizer, load
from ringflash.training.engines.materialise import materialise
from ringflash.training.extras import require

SEPARATOR = "<|document|>"
"""What the recipe's own tokenizers' separator is called in Transformers."""

CPU = torch.device("cpu")

LARGEST_ERROR = 1e-3
"""Of logits, of their largest: both models compute in fp32 with the weights that were written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; an error that ringflash raises on purpose is one line, not a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--shard-size", default="5GB", help="largest file of weights (5GB)")
    options = parser.parse_args(arguments)
    try:
        error = export(options.run, options.out, options.shard_size)
        print(f"{options.out}: the logits differ by {error:.1g} of the largest from those of {options.run}")
    except RingflashError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def export(run: Path, out: Path, shard_size: str = "5GB") -> float:
    """Write a run as a Hugging Face folder; returns how far its logits are from the run's, of the largest.

    Args:
        run: a run's folder, or one of its checkpoints.
        out: a folder that is new or empty.
        shard_size: largest file of weights.

    Raises:
        ArgumentError: a folder that is not empty or cannot be written, a size that is none, or a model that
            Transformers has no name for.
        CheckpointError: no checkpoint, a damaged one, or logits that differ.
    """
    require("ringflash.export", "transformers", "accelerate")
    if not re.fullmatch(r"\d*[1-9]\d* ?[KMGT]B", shard_size, re.IGNORECASE):
        raise ArgumentError(f"--shard-size={shard_size}; allowed are numbers with KB, MB, GB or TB, as 5GB")
    path = found_at(run)
    if path is None:
        raise CheckpointError(f"{run}: no complete checkpoint in it, nor is it one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArgumentError(f"{out} is there already; give a new folder")
    checkpoint = Checkpoint(path, weights_alone=True)
    tokenizer = _tokenizer(path.parent.parent / TOKENIZER)
    model, reference = _models(checkpoint)
    ids = _sample(model)
    expected = reference(ids)
    if tokenizer.bos_token_id is not None and model.config.bos_token_id is None:
        model.config.bos_token_id = tokenizer.bos_token_id
    with _written(out) as partial:
        model.to(torch.bfloat16).save_pretrained(partial, max_shard_size=shard_size)
        tokenizer.save_pretrained(partial)
        del model, reference
        return _check(partial, ids, expected)


@contextlib.contextmanager
def _written(out: Path) -> Generator[Path]:
    """A folder to write into, which gets its name once all is written and found good, and is removed otherwise."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()  # it is empty
        partial.rename(out)
    except (OSError, SafetensorError) as error:  # of a full disk either
        raise ArgumentError(f"{out}: cannot write there: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _models(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """A Transformers model with the checkpoint's weights rounded to bf16, in fp32, and what gives the run's logits."""
    about = checkpoint.state["model"]
    if "huggingface" in about:
        return _of_folder(checkpoint, about)
    return _of_llama(checkpoint, about)


def _of_folder(checkpoint: Checkpoint, about: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, GenerationConfig

    from ringflash.training.model.pretrained import PREFIX, empty_model

    settings = dict(about["huggingface"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = empty_model(config, str(checkpoint.path)).eval()

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    if about["lora"] is None:
        materialise(model, CPU, lambda name, weight: weight.copy_(_rounded(checkpoint, PREFIX + name)))
    else:
        _merge(checkpoint, model, Path(about["folder"]), about["lora"], logits)
    for name, values in about["buffers"].items():
        buffer = model.get_buffer(name)
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
    if about["generation"] is not None:
        model.generation_config = GenerationConfig.from_dict(about["generation"])
    return model, logits


@torch.no_grad()
def _merge(
    checkpoint: Checkpoint, model: Any, folder: Path, lora: dict[str, Any], logits: Callable[[Tensor], Tensor]
) -> None:
    """Fill a model with the weights of the folder that adapters were trained on, and with what they add to these."""
    from ringflash.training.model.adapters import BASE, add_adapters, is_adapter, merge_adapters
    from ringflash.training.model.folder import FolderWeights
    from ringflash.training.model.pretrained import PREFIX

    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint.path}: the weights that its adapters were trained on are no longer in {folder}"
        )
    weights = FolderWeights(folder, model)
    if weights.digest != lora["weights"]:
        raise CheckpointError(f"{checkpoint.path}: its adapters were trained on other weights than are in {folder} now")
    add_adapters(model, LoraConfig(**{name: value for name, value in lora.items() if name != "weights"}))

    def fill(name: str, weight: Tensor) -> None:
        own = is_adapter(name)
        weight.copy_(checkpoint.read(f"weight/{PREFIX}{name}") if own else weights.read(name.replace(BASE, "")))

    materialise(model, CPU, fill)
    ids = _sample(model)
    expected = logits(ids)
    merge_adapters(model)
    _compare(logits(ids), expected, f"{checkpoint.path}: merged with its adapters")
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())


def _of_llama(checkpoint: Checkpoint, about: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from ringflash.training.model.rope import as_transformers
    from ringflash.training.model.shape import head_dim
    from ringflash.training.model.transformer import Transformer

    run = checkpoint.state["config"]
    if run["attention"]["mask"] != "causal":
        raise ArgumentError(
            f"{checkpoint.path}: attention.mask={run['attention']['mask']}; a Llama of Transformers is causal"
        )
    about = dict(about)
    vocab_size, scaling = about.pop("vocab_size"), RopeScalingConfig(**about.pop("rope_scaling"))
    shape = ModelConfig(
        **about | {"rope_scaling": scaling, "rope_parameters": RopeParametersConfig(**about["rope_parameters"])}
    )
    with torch.device("meta"):
        ours = Transformer(shape, vocab_size)
    materialise(ours, CPU, lambda name, weight: weight.copy_(_rounded(checkpoint, name)))
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    config = LlamaConfig(
        vocab_size=vocab_size,
        rms_norm_eps=shape.rms_norm_eps,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_parameters=as_transformers(head_dim(shape), shape.rope_theta, scaling),
        max_position_embeddings=run["train"]["seqlen"],
        bos_token_id=None,
        eos_token_id=None,
        **{name: getattr(shape, name) for name in names.split()},
    )
    theirs = LlamaForCausalLM(config).eval()
    weights = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights)

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return ours(ids, torch.arange(ids.shape[1])[None], cu_seqlens=[0, ids.shape[1]])

    return theirs, logits


def _rounded(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read(f"weight/{name}").bfloat16().float()


def _tokenizer(folder: Path) -> Any:
    """A run's tokenizer as one of Transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; a checkpoint is exported from within its run's folder")
    ours = load(folder)
    if isinstance(ours, ByteTokenizer):
        backend = Tokenizer(models.BPE(ByteTokenizer.alphabet(), []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif isinstance(ours, BPETokenizer):
        backend = ours.backend
    else:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend.add_special_tokens([AddedToken(SEPARATOR, special=True)])
    assert backend.token_to_id(SEPARATOR) == ours.separator
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SEPARATOR)


@torch.no_grad()
def _check(out: Path, ids: Tensor, expected: Tensor) -> float:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    return _compare(loaded(input_ids=ids, use_cache=False).logits, expected, str(out))


def _sample(model: Any) -> Tensor:
    return torch.arange(64)[None] % model.config.get_text_config().vocab_size


def _compare(logits: Tensor, expected: Tensor, what: str) -> float:
    error = float((logits - expected).abs().max() / expected.abs().max())
    if not error <= LARGEST_ERROR:
        raise CheckpointError(f"{what}: its logits differ by {error:.2g} of the largest from those of the run")
    return error


if __name__ == "__main__":
    main()
