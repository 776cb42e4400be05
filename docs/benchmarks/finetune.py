"""Make a Hugging Face folder and long documents for the recipe to fine-tune, on a machine without a network.

    python docs/benchmarks/finetune.py made                          # Llama-3.2-1B's shape
    python docs/benchmarks/finetune.py made --shrink 32 --megabytes 2    # without GPUs

`made/model` has the public shape of Llama-3.2-1B and random weights. A run on it shows that the recipe runs, its
speed and memory, and that it learns; not how good a tuned Llama is. Its tokenizer is a byte-level BPE with Llama 3's
special tokens and chat template, trained here, of fewer tokens than the embedding has rows. `made/texts/packages.jsonl`
holds the Python source text of this machine's packages, one document for each folder two deep, as torch/nn.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
"""config.json of meta-llama/Llama-3.2-1B."""

SHRUNK = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Pieces of text that none of Llama 3's tokens crosses."""

BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL = [BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", TURN]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

SHORTEST, LONGEST = 1 << 15, 1 << 21
"""Bytes of a document: some 8,192 tokens and more; longer ones are cut, so that no package outweighs all others."""

TOKENIZER_BYTES = 1 << 23
"""Text that the tokenizer is trained on: a part does, and takes seconds."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--megabytes", type=float, default=40, help="of text (40: some 10 million tokens)")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes of the model by this (1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the choice of documents (0)")
    options = parser.parse_args()
    (options.folder / "texts").mkdir(parents=True)
    texts = documents(int(options.megabytes * 1e6), options.seed)
    with (options.folder / "texts" / "packages.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    shape = SHAPE | {name: SHAPE[name] // options.shrink for name in SHRUNK}
    shape["num_hidden_layers"] = max(2, shape["num_hidden_layers"])
    tokenizer = write_tokenizer(texts, options.folder / "model", min(32768, shape["vocab_size"]))
    torch.manual_seed(options.seed)
    config = LlamaConfig(**shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.folder / "model")
    parameters = sum(weight.numel() for weight in model.parameters())
    lengths = sorted(map(len, texts))
    print(
        f"{options.folder}: {parameters / 1e6:,.0f} M parameters, {len(tokenizer):,} tokens; {len(texts)} documents of "
        f"{lengths[0]:,} to {lengths[-1]:,} characters, {sum(lengths):,} together"
    )


def documents(most: int, seed: int) -> list[str]:
    """Texts of packages in a random order, as many as go into so many characters.

    Args:
        most: characters of all.
        seed: of the order.
    """
    found = sorted(packages())
    random.Random(seed).shuffle(found)
    texts, left = [], most
    for name, files in found:
        text = _text(name, files)[: min(LONGEST, left)]
        if len(text) >= SHORTEST:
            texts.append(text)
            left -= len(text)
    return texts


def packages() -> Iterator[tuple[str, list[Path]]]:
    """Packages two folders deep, as torch/nn, with all Python files in them, and what lies directly in a package."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    for root in roots:
        inside: dict[str, list[Path]] = defaultdict(list)
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts[:-1]
            if "site-packages" not in parts and "dist-packages" not in parts:
                inside["/".join(parts[:2]) or file.stem].append(file)
        yield from inside.items()


def _text(name: str, files: list[Path]) -> str:
    parts, size = [f"# {name}\n"], 0
    for file in files:
        parts.append(f"\n# {file.name}\n{file.read_text(encoding='utf-8', errors='ignore')}")
        size += len(parts[-1])
        if size >= LONGEST:
            break
    return "".join(parts).replace("\0", "")


def write_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Llama 3's pieces, special tokens and chat template."""
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    share = min(1.0, TOKENIZER_BYTES / sum(map(len, texts)))
    backend.train_from_iterator((text[: int(len(text) * share)] for text in texts), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=TURN)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    main()
