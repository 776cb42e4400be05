"""Train Hugging Face models over the GPUs of a host, beside `sdpa` under torch's context parallelism.

    torchrun --nproc-per-node 4 docs/benchmarks/models.py --out models-4.json
    torchrun --nproc-per-node 2 docs/benchmarks/models.py --shrink 8 --tokens 128 --check 64     # without GPUs

Shapes of Llama-3.2-1B, Gemma-3-1B and gpt-oss-20b (4 of its 24 layers), random weights in bf16, a vocabulary of 32,000,
one sequence, every rank the whole model. Each is first checked: loss and gradients of a short sequence beside those of
eager attention in fp32 on one device, and beside what eager attention in bf16 makes of the same. Then forward and
backward are timed, the slowest rank's, median over the repeats. The peer is called as accelerate calls it: its hooks
take the masks off, its `context_parallel` shards the batch; models that it refuses are said so, with its own words.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import ringflash.transformers
from ringflash.launch.benchmark_device import machine

VOCABULARY = 32000
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
    },
    "gpt-oss-20b, 4 layers": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
    },
}
"""Values of the config.json files of meta-llama/Llama-3.2-1B, google/gemma-3-1b-pt and openai/gpt-oss-20b."""
SHRUNK = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts")

Batch = dict[str, Any]
Step = Callable[[], Tensor]


def config_of(name: str, shrink: int) -> PretrainedConfig:
    """A shape; layers, widths and experts divided by `shrink`."""
    shape = {key: max(4, x // shrink) if key in SHRUNK else x for key, x in SHAPES[name].items()}
    return AutoConfig.for_model(**shape, vocab_size=VOCABULARY, use_cache=False, pad_token_id=0)


def build(config: PretrainedConfig, attention: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same weights in every call and on every rank: those of bf16, also in fp32."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter.data)
    return (model.float() if dtype == torch.float32 else model).train()  # .to(bf16) would round the rotary frequencies


def batch_of(tokens: int, device: torch.device) -> Batch:
    """One sequence of random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(1, VOCABULARY, (1, tokens), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids.clone()}


# The contestants: a step is forward and backward, and returns this rank's part of the loss, a mean over ranks


def ring_step(model: PreTrainedModel, batch: Batch) -> Step:
    """Ours; the batch is sharded in every step."""
    sequence = ringflash.transformers.SequenceParallel(model)

    def step() -> Tensor:
        loss = model(**sequence.shard(batch)).loss
        loss.backward()
        return loss.detach()

    return step


def context_parallel_step(model: PreTrainedModel, batch: Batch, mesh: DeviceMesh) -> Step:
    """accelerate's way: its hooks in the model and torch's context manager round the step."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method("allgather")  # accelerate's default
    _attach_context_parallel_hooks(model)
    ids, labels = batch["input_ids"], batch["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def step() -> Tensor:
        parts = [ids.clone(), shifted.clone(), positions.clone()]
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[1] * 3, no_restore_buffers=set(parts)):
            logits = model(input_ids=parts[0], position_ids=parts[2]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), parts[1].flatten(), reduction="sum")
            loss = loss * mesh.size() / (ids.shape[1] - 1)
            loss.backward()
        return loss.detach()

    return step


def one_device_step(model: PreTrainedModel, batch: Batch) -> Step:
    """The whole sequence on this device."""

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


# Check


def result_of(model: PreTrainedModel, step: Step, reduce: bool) -> tuple[float, Tensor]:
    """Loss and all gradients on end, fp32; over the ranks their mean."""
    loss = step().float()
    gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    if reduce:
        for x in (loss, gradients):
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return loss.item(), gradients


def check(config: PretrainedConfig, tokens: int, device: torch.device, mesh: DeviceMesh) -> dict[str, Any]:
    """Relative errors of loss and gradients to eager attention in fp32, of each contestant in bf16."""
    batch = batch_of(tokens, device)

    def errors(attention: str, make: Callable[..., Step], *more: Any, reduce: bool = True) -> Any:
        try:
            with measured(device):
                model = build(config, attention, torch.bfloat16, device)
                loss, gradients = result_of(model, make(model, batch, *more), reduce)
        except Exception as refusal:
            return words(refusal)
        return {
            "loss": abs(loss - exact_loss) / abs(exact_loss),
            "gradient": ((gradients - exact).norm() / exact.norm()).item(),
        }

    with measured(device):
        model = build(config, "eager", torch.float32, device)
    exact_loss, exact = result_of(model, one_device_step(model, batch), reduce=False)
    del model
    found = {
        "eager, one device": errors("eager", one_device_step, reduce=False),
        "ring": errors("ring", ring_step),
        "context parallel": errors("sdpa", context_parallel_step, mesh),
    }
    return {"tokens": tokens, **found}


# Time


def seconds_of(step: Step, model: PreTrainedModel, repeats: int, device: torch.device) -> float:
    """The median step of the slowest rank."""
    times = []
    for _ in range(repeats + 2):
        dist.barrier()
        begin = now(device)
        step()
        model.zero_grad()
        times.append(now(device) - begin)
    slowest = torch.tensor(times[2:], device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def now(device: torch.device) -> float:
    """Seconds, when everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(
    config: PretrainedConfig, tokens: int, repeats: int, device: torch.device, mesh: DeviceMesh
) -> dict[str, Any]:
    """Tokens a second, and peak GiB of this rank, of each contestant; its words where it refuses."""
    batch = batch_of(tokens, device)
    found: dict[str, Any] = {}
    contestants: dict[str, tuple[str, Callable[[PreTrainedModel], Step]]] = {
        "ring": ("ring", lambda model: ring_step(model, batch)),
        "context parallel": ("sdpa", lambda model: context_parallel_step(model, batch, mesh)),
    }
    for name, (attention, make) in contestants.items():
        try:
            with measured(device) as memory:
                model = build(config, attention, torch.bfloat16, device)
                seconds = seconds_of(make(model), model, repeats, device)
            found[name] = {"tokens_per_second": tokens / seconds, "seconds": seconds, "gib": memory()}
        except Exception as refusal:
            found[name] = words(refusal)
        model = None
    return {"tokens": tokens, **found}


class measured(AbstractContextManager):  # noqa: N801 - it reads like a function
    """Peak memory of a block in GiB; 0 without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __enter__(self) -> Callable[[], float]:
        gc.collect()  # models are in cycles, and so are the frames of an error
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 2**30 if self._cuda else 0.0

    def __exit__(self, *_: object) -> None:
        return None


def words(refusal: Exception) -> str:
    """One line of it."""
    return f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:120]}"


# Tables


def speed(row: Any) -> str:
    """A cell."""
    return row if isinstance(row, str) else f"{row['tokens_per_second']:,.0f} tokens/s, {row['gib']:.1f} GiB"


def error(row: Any) -> str:
    """A cell."""
    return row if isinstance(row, str) else f"loss {row['loss']:.1e}, gradient {row['gradient']:.1e}"


def table(models: dict[str, Any], ranks: int) -> str:
    """Markdown."""
    lines = [
        f"| {ranks} ranks | tokens | ring | sdpa with context parallelism | eager bf16, one device |",
        "|---" * 5 + "|",
    ]
    for name, found in models.items():
        x = found["check"]
        cells = [error(x[key]) for key in ("ring", "context parallel", "eager, one device")]
        lines.append(f"| {name}, errors | {x['tokens']:,} | " + " | ".join(cells) + " |")
        for row in found["times"]:
            cells = [speed(row[key]) for key in ("ring", "context parallel")]
            lines.append(f"| {name} | {row['tokens']:,} | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of all figures, written after each model")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=SHAPES, metavar="NAME", help="all")
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192, 16384], help="a rank, that are timed")
    parser.add_argument("--check", type=int, default=2048, help="tokens of the sequence that is checked")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divides layers, widths and experts")
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    figures: dict[str, Any] = {"machine": machine(), "ranks": dist.get_world_size(), "models": {}}
    for name in options.models:
        config = config_of(name, options.shrink)
        figures["models"][name] = found = {"check": check(config, options.check, device, mesh), "times": []}
        for tokens in (dist.get_world_size() * x for x in options.tokens):
            found["times"].append(timed(config, tokens, options.repeats, device, mesh))
            if dist.get_rank() == 0:
                print(name, found["times"][-1], flush=True)
                if options.out:
                    options.out.write_text(json.dumps(figures, indent=1))
    if dist.get_rank() == 0:
        print(f"\n{table(figures['models'], dist.get_world_size())}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
