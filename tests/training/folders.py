"""Tiny Hugging Face folders: a model with random weights, and a tokenizer trained here, with a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|begin|>", "<|turn|>", "<|end|>"]
TEXTS = ["system user assistant\n", "What is 12 and 30? It is 42, as far as I know.\n", "hello, how are you today?\n"]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}GENERATION{{ message['content'] }}<|end|>END{% else %}"
    "{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED = TEMPLATE.replace("GENERATION", "{% generation %}").replace("END", "{% endgeneration %}")
"""Says which tokens an assistant generates."""
UNMARKED = TEMPLATE.replace("GENERATION", "").replace("END", "")
"""The same without saying it."""


def write_tokenizer(folder: Path, template: str | None = MARKED) -> PreTrainedTokenizerFast:
    """A byte-level BPE with three special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_folder(folder: Path, template: str | None = MARKED, model_type: str = "llama", **settings) -> Path:
    """A model and its tokenizer; weights are large enough for attention to matter."""
    tokenizer = write_tokenizer(folder, template)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **shape | settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
