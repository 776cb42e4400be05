"""Fine-tune a Hugging Face model by DeepSpeed, with each sequence on several ranks.

    torchrun --nproc-per-node 8 launch/finetune.py --model MODEL --data data.jsonl --deepspeed ds_config.json --save OUT

A script as users of `deepspeed.initialize` have it, with a JSON of their own: any ZeRO stage, with and without
offload, on GPUs and on CPU processes. Three lines, marked 1, 2 and 3, make it sequence parallel; docs/engines.md says
why the loss is multiplied by nothing and what not to pass to DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig

from ringflash.deepspeed import import_deepspeed
from ringflash.errors import ArgumentError, DataError, RingflashError
from ringflash.transformers import SequenceParallel  # 1: registers attn_implementation="ring"

IGNORED = -100
"""Label of tokens from which nothing is learned."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Join the other ranks and fine-tune; an error that ringflash raises on purpose is one line, not a traceback."""
    options = parse(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        finetune(options, device)
        dist.barrier()  # a process that goes while another still talks to it is at times aborted at its exit
    except RingflashError as error:
        print(f"rank {dist.get_rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        dist.destroy_process_group()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or name, with a tokenizer")
    parser.add_argument("--random-weights", action="store_true", help="of --model take config and tokenizer alone")
    parser.add_argument(
        "--data", type=Path, required=True, help=".jsonl of text, or of prompt and completion; or a text"
    )
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed's JSON")
    parser.add_argument("--sequence-size", type=int, help="ranks that share a sequence (all)")
    parser.add_argument("--longest", type=int, default=131072, help="tokens at which documents are cut (131072)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers, which saves memory")
    parser.add_argument("--save", type=Path, help="folder for the trained model")
    return parser.parse_args(arguments)


def finetune(options: argparse.Namespace, device: torch.device) -> list[float]:
    """All epochs, on the ranks of the default group.

    Returns:
        The mean loss of each optimizer step.
    """
    settings = read_settings(options.deepspeed)
    mesh = sequence_mesh(options.sequence_size, device)
    deepspeed = import_deepspeed(device)
    # While this lives, Transformers gives each rank its share of the weights alone where the JSON says stage 3.
    _stage_3 = HfDeepSpeedConfig(settings)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    examples: Any = list(read_examples(options.data, tokenizer, options.longest))
    if not examples:
        raise DataError(f"--data {options.data}: nothing in it can be learned")
    model = load(options)
    sequence = SequenceParallel(model, group=mesh["sequence"])  # 2
    sequence.fuse_loss()  # logits of a long sequence need more memory than anything else
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

    data = mesh["data"]  # ranks that share a sequence take the same batches
    sampler = DistributedSampler(examples, num_replicas=data.size(), rank=data.get_local_rank())
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    micro_batch = int(engine.train_micro_batch_size_per_gpu())  # 2.0 where it follows from train_batch_size
    loader = DataLoader(examples, micro_batch, sampler=sampler, collate_fn=packed)

    losses, total = [], torch.zeros((), device=device)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            loss = engine(**sequence.shard(batch), use_cache=False).loss  # 3
            engine.backward(loss)
            total += loss.detach() / engine.gradient_accumulation_steps()
            if engine.is_gradient_accumulation_boundary():
                dist.all_reduce(total)
                losses.append(total.item() / dist.get_world_size())
                total.zero_()
                if dist.get_rank() == 0:
                    print(f"step {len(losses)}: loss {losses[-1]:.5f}", flush=True)
            engine.step()
    if options.save is not None:
        save(options.save, model, tokenizer)
    return losses


def sequence_mesh(size: int | None, device: torch.device) -> DeviceMesh:
    """All ranks by "data" and "sequence": those of a row, which stand side by side, share their sequences.

    Args:
        size: ranks of a row; None for all.
        device: of this rank.
    """
    ranks = dist.get_world_size()
    size = ranks if size is None else size
    if size < 1 or ranks % size:
        raise ArgumentError(f"--sequence-size {size} with {ranks} ranks; allowed are divisors of {ranks}")
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("data", "sequence"))


def read_settings(path: Path) -> dict:
    """DeepSpeed's JSON."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--deepspeed {path}: {error}") from error
    if "optimizer" not in settings:
        raise ArgumentError(f"--deepspeed {path} has {sorted(settings)}; optimizer is missing")
    return settings


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The model of a folder, or one with random weights by its config.json."""
    if options.random_weights:
        config = AutoConfig.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="ring")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> Iterator[dict[str, list[int]]]:
    """Tokens and labels of each document, those of long ones in pieces; pieces that teach nothing are left out.

    Args:
        path: a .jsonl file, each line with "text", or with "prompt" and "completion", of which the completion alone is
            learned; any other file is the text of one document.
        tokenizer: its end-of-sequence token ends each document.
        longest: tokens of a piece.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, text in _documents(path):
        given = tokenizer(prompt)["input_ids"] if prompt else []
        learned = tokenizer(text, add_special_tokens=not given)["input_ids"] + end
        ids, labels = given + learned, [IGNORED] * len(given) + learned
        for begin in range(0, len(ids), longest):
            piece = slice(begin, begin + longest)
            if any(label != IGNORED for label in labels[piece][1:]):
                yield {"input_ids": ids[piece], "labels": labels[piece]}


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    """What is given and what is learned of each document."""
    if path.suffix != ".jsonl":
        yield "", path.read_text()
        return
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                yield ("", record["text"]) if "text" in record else (record["prompt"], record["completion"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"--data {path}, line {number}: {error!r}; allowed are objects with text, or prompt and completion"
                ) from error


@torch.no_grad()
def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what `from_pretrained` reads, by rank 0; the weights are put together one by one."""
    import deepspeed

    first = dist.get_rank() == 0
    state = {}
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters(weight):  # does nothing where a rank has whole weights
            if first:
                state[name] = weight.to("cpu", copy=True)
    if first:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
