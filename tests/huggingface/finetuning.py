"""A tiny model and what it learns: for engines a batch of each data rank, and what launch/finetune.py is given."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from batches import Documents, draw, gradients, learn_alone, masked_prompt
from families import SMALL
from families import draw as draw_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BEGIN, END = 256, 257
"""Tokens behind those of the bytes."""

# Adam's first steps would turn rounding into whole steps where a gradient is almost zero; a large eps makes the update
# linear in the gradient.
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-2, "weight_decay": 0.1}

RECORDS = [
    {"text": "Keys and values travel round a ring."},
    {"prompt": "How many ranks? ", "completion": "Two."},
    {"text": "x"},
    {"prompt": "Which rank? ", "completion": "The one that holds the last tokens of this long answer."},
    {"text": "Positions say which token is which, wherever it lies."},
    {"prompt": "A question without much of an answer, but long in itself: what? ", "completion": "."},
    {"text": "No rank holds the whole sequence."},
    {"prompt": "And? ", "completion": "Gradients are those of one device."},
]
"""Targets are many in some documents and few in others, so that ranks and batches have unequal shares."""


def build(attn_implementation: str) -> PreTrainedModel:
    """A tiny Llama of bytes, whose head is its embedding; the same weights in every process."""
    config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": 258, "tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    draw_weights(model)
    return model


def documents_of(number: int, length: int = 33) -> Documents:
    """The batch of a data rank, of another length than the others'; its first tokens are not learned."""
    ids = draw(length + 5 * number, seed=number)
    return masked_prompt(ids, answer=len(ids[0]) - 7)


@lru_cache
def gradients_of(ranks: int) -> dict[str, Tensor]:
    """Those of the mean of the first data ranks' losses, on one device."""
    model = build("eager")
    for number in range(ranks):
        learn_alone(model, documents_of(number))
    return {name: gradient / ranks for name, gradient in gradients(model).items()}


def scale(changes: dict[str, Tensor], expected: dict[str, Tensor]) -> float | None:
    """How many times the expected gradients some changes of weights are; None if they are others."""
    pairs = [(changes[name].double(), gradient.double()) for name, gradient in expected.items()]
    factor = sum((a * b).sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    worst = max((a - factor * b).abs().max() for a, b in pairs)
    return factor.item() if worst < 1e-4 * max(b.abs().max() for _, b in pairs) else None


def write_folder(folder: Path) -> None:
    """`model/` and `data.jsonl`."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": BEGIN, "</s>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "model")
    build("eager").save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def settings(stage: int, offload: bool = False, **others: object) -> dict:
    """DeepSpeed's JSON, with torch's AdamW: DeepSpeed's own is compiled for minutes."""
    zero = {"stage": stage, "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 3.0,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}},
        "zero_optimization": zero,
        **others,
    }
