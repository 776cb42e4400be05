"""Steps of full training at several lengths: seconds, tokens/s, MFU, memory of the GPU and of its host.

    torchrun --nproc-per-node 4 docs/benchmarks/long_context.py 131072 --out long_context.json
    torchrun --nproc-per-node 4 docs/benchmarks/long_context.py 524288 engine.memory=offload
    torchrun --nproc-per-node 4 docs/benchmarks/long_context.py 8192 131072 262144 engine=fsdp2

One document of random tokens a step, on random weights of `experiment=llama3_8b_long`, or of what overrides name. MFU
is of the useful operations (`ringflash.training.estimate.operations`), against what the GPU's maker says of bf16. Each
length is a model of its own; one that does not fit ends the command, behind what was measured. Under ZeRO a command has
one length: DeepSpeed holds weights, gradients and optimizer of an engine until its process ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError
from ringflash.launch.benchmark_device import machine
from ringflash.launch.train import join
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine
from ringflash.training.estimate.hardware import card_of
from ringflash.training.estimate.operations import operations_of
from ringflash.training.model.create import create_model

GIB = 2**30


def of_length(config: Config, device: torch.device, steps: int) -> list[dict]:
    """What each step took, on the rank on which that was most."""
    tokens, ranks = config.train.seqlen, dist.get_world_size()
    model = create_model(config, 257, dist.group.WORLD)
    useful, peak = operations_of(model), card_of(device).peak if device.type == "cuda" else math.nan
    engine = create_engine(model, device, config.engine, config.optimizer, 1)
    rows, on_gpu = [], device.type == "cuda"
    for step in range(steps):
        ids = torch.randint(config.model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(step))
        shard = model.shard({"input_ids": ids, "cu_seqlens": [0, tokens]})
        shard["sharding"].prepare(device)
        shard = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in shard.items()}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        dist.barrier()
        begin = time.monotonic()
        loss, norm, _ = engine.train_step([shard], 1e-5)
        loss = loss.item()
        dist.barrier()
        took = time.monotonic() - begin
        host = model.memory.host
        sizes = [torch.cuda.max_memory_allocated() if on_gpu else 0, 0 if host is None else host.taken]
        most = torch.tensor([float(x) for x in sizes], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        pairs = torch.tensor(shard["sharding"].pairs, dtype=torch.float64, device=device)
        dist.all_reduce(pairs)
        row = {
            "tokens": tokens,
            "step": step,
            "seconds": took,
            "tokens_per_second_per_gpu": tokens / took / ranks,
            "mfu": useful.of(tokens, pairs.item()) / took / ranks / peak,
            "gpu_gib": most[0].item() / GIB,
            "host_gib_per_gpu": most[1].item() / GIB,
            "loss": loss,
            "gradient_norm": float(norm),
            "memory": model.memory.decision,
        }
        rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
    return rows


def _of_one_process(lengths: list[str], configs: list[Config]) -> list[Config]:
    """The configurations of some lengths.

    Raises:
        ArgumentError: several under an engine whose memory is not free again before the next one.
    """
    engine = configs[0].engine.name
    if len(configs) > 1 and engine.startswith("zero"):
        raise ArgumentError(
            f"{' '.join(lengths)} with engine={engine}: allowed is one length in a process, as DeepSpeed would hold "
            "what the first one took beside the next"
        )
    return configs


def main() -> None:
    """Measure every length; rank 0 writes what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="lengths, and overrides of the configuration")
    parser.add_argument("--steps", type=int, default=3, help="of each length (3)")
    parser.add_argument("--out", type=Path, help="where to write the figures")
    options = parser.parse_args()
    lengths = [word for word in options.words if word.isdigit()]
    overrides = ["experiment=llama3_8b_long", *(word for word in options.words if not word.isdigit())]
    rows: list[dict] = []
    device: torch.device | None = None
    for config in _of_one_process(lengths, [load([*overrides, f"train.seqlen={length}"]) for length in lengths]):
        device = join(config) if device is None else device
        rows += of_length(config, device, options.steps)
        gc.collect()  # models are in cycles
        if options.out is not None and dist.get_rank() == 0:
            found = {"machine": machine(), "ranks": dist.get_world_size(), "overrides": overrides, "rows": rows}
            options.out.write_text(json.dumps(found, indent=1))
    dist.barrier()  # nobody leaves while another is still at something
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
