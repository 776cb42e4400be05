"""By how much steps are later for a checkpoint that is written beside them, and how fast it is copied and written.

    torchrun --nproc-per-node 2 docs/benchmarks/checkpoints.py model.num_hidden_layers=14 --engines fsdp2 zero3

Random tokens on random weights of `experiment=llama3_8b_long`, or of what overrides name. Of each engine: steps without
a checkpoint; a copy to host memory with nothing beside it, for which training would wait if it were not copied beside
the next step; then steps from the beginning of a checkpoint until it is written, or for so many seconds. Each step is
waited for, and the slowest rank counts. Files go to a folder that all ranks see, and are removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringflash.configs.schema import Config
from ringflash.launch.benchmark_device import GIB, machine
from ringflash.launch.train import join
from ringflash.training.checkpoint.host_copy import copy_bytes
from ringflash.training.checkpoint.saving import Saver
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine
from ringflash.training.model.create import create_model
from ringflash.training.ranks import from_rank_0


def slowest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that something takes on the rank that takes longest; all begin together."""
    dist.barrier()
    began = time.monotonic()
    work()
    took = torch.tensor(time.monotonic() - began, device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def of_engine(config: Config, device: torch.device, folder: Path, steps: int, seconds: float) -> dict[str, Any]:
    """What checkpoints of one engine cost."""
    tokens = config.train.seqlen
    model = create_model(config, 257, dist.group.WORLD)
    weights = sum(weight.numel() for weight in model.parameters())
    saver = Saver(folder, device, keep=1)
    reserved = slowest(lambda: saver.reserve(copy_bytes(weights, dist.get_world_size(), False)), device)
    engine = create_engine(model, device, config.engine, config.optimizer)
    engine.before_update = saver.protect
    ids = torch.randint(model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    shard = model.shard({"input_ids": ids, "cu_seqlens": [0, tokens]})
    shard["sharding"].prepare(device)
    shard = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in shard.items()}

    def step() -> float:
        return slowest(lambda: engine.train_step([shard], 1e-5)[0].item(), device)

    def begin(number: int) -> None:
        saver.begin(number, engine.pieces(), engine.sizes(), {"step": number})

    first = [step() for _ in range(3)]
    before = [step() for _ in range(steps)]

    def copied() -> None:
        begin(1)
        saver.protect()
        if device.type == "cuda":
            torch.cuda.synchronize()

    alone = slowest(copied, device)
    saver.give_up(but=0)
    settled = [step() for _ in range(2)]
    began = time.monotonic()
    after = [slowest(lambda: begin(2), device) + step()]
    while (writing := from_rank_0(saver.writing)) and from_rank_0(time.monotonic() - began) < seconds:
        after.append(step())
    took = time.monotonic() - began
    gib = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / GIB
    saver.give_up(but=0 if writing else 2)
    saver.finish()
    usual = statistics.median(before)
    return {
        "engine": config.engine.name,
        "layers": config.model.num_hidden_layers,
        "weights": weights,
        "gib_of_a_rank": sum(piece.size for piece in engine.pieces()) * 4 / GIB,
        "reserved_seconds": reserved,
        "copy_alone_seconds": alone,
        "usual_step": usual,
        "slowest_usual_step": max(before),
        "first_step_later_by": after[0] - usual,
        "slowest_later_by": max(after) - usual,
        "all_later_by": sum(after) - len(after) * usual,
        "steps_beside": len(after),
        "written": not writing,
        "seconds": took,
        "gib_written": gib,
        "news": saver.news(),
        "steps": {"first": first, "before": before, "settled": settled, "after": after},
    }


def main() -> None:
    """Measure every engine; rank 0 prints, and writes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    parser.add_argument("--engines", nargs="+", default=["fsdp2", "zero3"], help="one after another (fsdp2 zero3)")
    parser.add_argument("--steps", type=int, default=8, help="without a checkpoint (8)")
    parser.add_argument("--seconds", type=float, default=600, help="of writing, at most (600)")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints (a temporary one of this machine)")
    parser.add_argument("--out", type=Path, help="where to write the figures")
    options = parser.parse_args()
    config = load(["experiment=llama3_8b_long", *options.overrides])
    device = join(config)
    folder = from_rank_0(options.folder or Path(tempfile.mkdtemp()))
    rows = []
    for name in options.engines:
        chosen = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name=name))
        rows.append(of_engine(chosen, device, folder / name, options.steps, options.seconds))
        gc.collect()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / name)
            print(json.dumps(rows[-1]), flush=True)
            if options.out is not None:
                found = {"machine": machine(), "ranks": dist.get_world_size(), "overrides": options.overrides}
                options.out.write_text(json.dumps(found | {"rows": rows}, indent=1))
    dist.barrier()  # nobody leaves while another is still at something
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
