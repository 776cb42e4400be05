"""Runs of Hugging Face's Trainers with tiny models, on one device and on the ranks of a pool."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from ringflash.transformers import RingTrainer

VOCABULARY = 64
IGNORED = -100
LOSS, GRADIENT, WEIGHTS = 1e-5, 1e-4, 2e-5
"""Largest error: of a logged number, and of the norm of gradients, of itself; of a weight, of its tensor's largest."""

SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "num_train_epochs": 2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "max_grad_norm": 0.5,
    "learning_rate": 1e-2,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-2,  # makes an update of Adam linear in the gradient: it would turn rounding into whole steps
    "weight_decay": 0.1,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}


class RingSFTTrainer(RingTrainer, SFTTrainer):
    """TRL's with sequences on several ranks, as users write it."""


TRAINERS = {"transformers": (Trainer, RingTrainer, TrainingArguments), "trl": (SFTTrainer, RingSFTTrainer, SFTConfig)}


def examples(count: int, seed: int = 0, shortest: int = 3) -> Dataset:
    """Sequences of up to 40 tokens. Prompts are masked: a third keep one target, a third nearly all."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(shortest, 41, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = (1, length - 1, length // 2)[number % 3]
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def padded(rows: list[dict]) -> dict[str, Tensor]:
    """A batch padded on the right."""
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
    }


def build(attn_implementation: str, family: str = "llama", lora: bool = False, **changes: Any) -> nn.Module:
    """A model of two layers, with the same weights for every implementation and in every process."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:  # larger than a new model's, so that attention looks at single tokens
                nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
        return get_peft_model(model, LoraConfig(**LORA)) if lora else model


def tokenizer() -> PreTrainedTokenizerFast:
    """Says which token pads and which ends."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    model = WordLevel(words, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<pad>", eos_token="<eos>")


@contextmanager
def launched() -> Iterator[None]:
    """The environment of a process that torchrun has started, or of one without it; accelerate begins anew."""
    before = dict(os.environ)
    if dist.is_initialized():
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def launched_for_fsdp() -> Iterator[None]:
    """The same where accelerate would take FSDP, which it leaves out on CPUs."""
    with launched():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        yield


@dataclass(frozen=True)
class Run:
    """A run of a Trainer.

    Attributes:
        trainer: "transformers" or "trl".
        groups: of ranks; one device has as many times the batch.
        batch: sequences of a batch of one group.
        arguments: for the training arguments.
        named: for the Trainer.
        model: for `build`.
        fused: the loss is computed in chunks, without logits.
    """

    trainer: str = "transformers"
    groups: int = 1
    batch: int = 2
    arguments: dict = field(default_factory=dict)
    named: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    fused: bool = False

    def make(self, folder: str, ring: bool, kind: type | None = None, **named: Any) -> Trainer:
        """A Trainer: RingTrainer, or the plain one with eager attention; `kind` in its place."""
        plain, ringed, config = TRAINERS[self.trainer]
        batch = self.batch * (1 if ring else self.groups)
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        model = build("ring" if ring else "eager", **self.model)  # before ZeRO would make it in parts
        args = config(output_dir=folder, **(SETTINGS | sizes | self.arguments))
        given = {"train_dataset": examples(11), "eval_dataset": examples(5, seed=1)}
        given |= {"data_collator": padded} if self.trainer == "transformers" else {"processing_class": tokenizer()}
        given |= self.named | named
        if "model_init" not in given:
            given.setdefault("model", model)
        trainer = (kind or (ringed if ring else plain))(args=args, **given)
        if self.fused and ring:
            trainer.sequence.fuse_loss()
        return trainer


def results_of(trainer: Trainer, resume: str | None = None) -> dict[str, Any]:
    """Trains, and says what is to be compared: logs without times, weights, and the loss that `train` returns."""
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    logs = [
        {name: x for name, x in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
    ]
    weights = {name: x.detach() for name, x in trainer.model.named_parameters() if x.requires_grad}
    weights = {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in weights.items()}
    return {"logs": logs, "weights": weights, "loss": loss}


def train(run: Run, folder: str, ring: bool = True, resume: str | None = None, **named: Any) -> dict[str, Any]:
    """Body of a rank, or of one device."""
    with launched():
        return results_of(run.make(folder, ring, **named), resume)


def on_one_device(run: Run) -> dict[str, Any]:
    """The plain Trainer with eager attention."""
    assert not dist.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        return train(run, folder, ring=False)


def over_ranks(pool: Callable, ranks: int, run: Run, folder: Path, **named: Any) -> list[dict[str, Any]]:
    """RingTrainer on each rank."""
    return pool(ranks).run(train, run, str(folder), sequence_size=ranks // run.groups, timeout=200, **named)


def assert_same_run(results: list[dict[str, Any]], expected: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """What rank 0 logs, and on all ranks the weights and the loss that `train` returns, are those of one device."""
    assert_same_logs(results[0]["logs"], expected["logs"], without)
    for result in results:
        torch.testing.assert_close(result["loss"], expected["loss"], rtol=LOSS, atol=0)
        assert_same_weights(result["weights"], expected["weights"])


def assert_same_logs(found: list[dict], expected: list[dict], without: tuple[str, ...] = ()) -> None:
    """The same entries in the same order, with the same numbers."""
    assert len(found) == len(expected)
    for entry, right in zip(found, expected, strict=True):
        entry, right = ({name: x for name, x in logs.items() if name not in without} for logs in (entry, right))
        assert entry.keys() == right.keys()
        for name, value in right.items():
            tolerance = (GRADIENT if name == "grad_norm" else LOSS) * abs(value) + 1e-7
            assert abs(entry[name] - value) <= tolerance, f"{name} of {entry}, where one device has {right}"


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to roundings of fp32."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        tolerance = WEIGHTS * weight.abs().max().item()
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
