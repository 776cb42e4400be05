"""engine.compile: what blocks compute beside attention and tiles is compiled whole, and attention still runs once."""

from __future__ import annotations

import collections
import contextlib
import functools

import pytest
import recipe
import torch
import torch._dynamo
import torch.distributed as dist
from folders import write_folder
from test_adapters import LORA
from test_engine import assert_same
from test_pretrained import _assert_same as assert_same_model
from test_pretrained import _plain, _steps
from torch._dynamo.utils import counters

from ringflash.configs.schema import EngineConfig
from ringflash.errors import ArgumentError
from ringflash.kernels.cpu import blockwise
from ringflash.parallel.transport.send_recv import SendRecv
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine
from ringflash.training.memory import rows

CPU = torch.device("cpu")
COMPILE = {"compile": True}


@contextlib.contextmanager
def _graphs():
    """Counts graphs, breaks, and calls of the attention kernel and the transport; C++ is compiled for none of them."""
    calls = collections.Counter()

    def counting(name, function):
        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        for owner, name in ((blockwise, "attend"), (blockwise, "attend_backward"), (SendRecv, "transfer")):
            patch.setattr(owner, name, counting(name, getattr(owner, name)))
        yield calls
        calls["graphs"], calls["breaks"] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _counted(run, *arguments, tile=2**21, **options):
    with _graphs() as calls, pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tile)
        result = run(*arguments, **options)
    return result, calls


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_ranks_with_compiled_blocks_train_as_one_device_does(pool, name):
    expected = recipe.plain()
    for result, calls in pool(2).run(_counted, recipe.steps, name, degree=2, micro_batch=2, settings=COMPILE):
        assert_same(result, expected)
        assert (calls["graphs"], calls["breaks"]) == (2, 0)  # before attention and behind it, for all blocks together


@pytest.mark.parametrize("memory", ["recompute", "offload", "offload_pairs"])
def test_what_is_kept_of_compiled_blocks_changes_no_bit_and_attention_runs_once(pool, memory):
    job = {"degree": 2, "settings": COMPILE}
    (expected, plain), (found, calls) = (
        pool(2).run(_counted, recipe.steps, "fsdp2", memory=each, **job)[0] for each in ("keep", memory)
    )
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])
    for name in ("attend", "attend_backward", "transfer"):
        assert calls[name] == plain[name] >= 2


@pytest.mark.parametrize("memory", ["recompute", "offload_pairs"])
def test_compiled_blocks_train_in_rounds_as_one_device_does_whole(pool, memory):
    job = {"degree": 1, "memory": memory, "settings": COMPILE, "tile": 128 * 48}  # 404 tokens in four rounds
    ((found, calls),) = pool(1).run(_counted, recipe.steps, "fsdp2", **job)
    assert_same(found, recipe.plain())
    assert calls["breaks"] == 0
    assert calls["attend"] == calls["attend_backward"] == 2 * 2 * 4  # steps, blocks, rounds


def _lengths(*lengths):
    model = recipe.build(dist.group.WORLD, device="meta")
    engine = create_engine(model, CPU, EngineConfig("fsdp2", compile=True), recipe.OPTIMIZER)
    for length in lengths:
        batch = {"input_ids": torch.arange(length)[None] % 65, "cu_seqlens": [0, length]}
        engine.train_step([model.shard(batch)], 1e-3)


def test_blocks_are_compiled_for_one_length_and_then_once_more_for_all(pool):
    ((_, calls),) = pool(1).run(_counted, _lengths, 30, 40, 50, 31, 97)
    assert (calls["graphs"], calls["breaks"]) == (4, 0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
def test_compiled_layers_of_transformers_train_as_it_does_and_keep_what_is_asked(pool, tmp_path, lora):
    path = write_folder(tmp_path, tie_word_embeddings=True)
    job = {"degree": 2, "lora": lora, "settings": COMPILE}
    kept, moved = (pool(2).run(_counted, _steps, path, "fsdp2", memory=each, **job)[0] for each in ("keep", "offload"))
    for (result, calls), (_, expected) in ((kept, kept), (moved, kept)):
        assert calls["graphs"] >= 2
        assert calls["breaks"] == 0
        assert calls["attend"] == expected["attend"]
        if lora is None:
            assert_same_model(result, _plain(path))
    tiled, calls = pool(2).run(_counted, _steps, path, "fsdp2", memory="offload", tile=6464, **job)[0]
    assert_same_model(tiled, kept[0])
    assert calls["breaks"] == 0
    assert moved[0][0] == kept[0][0]
    assert all(torch.equal(moved[0][1][key], kept[0][1][key]) for key in kept[0][1])


def test_engines_whose_weights_are_not_seen_refuse_it_by_name():
    with pytest.raises(
        ArgumentError, match=r"engine\.compile=true with engine\.name=zero3, .*allowed are ddp and fsdp2"
    ):
        check(load(["engine=zero3", "engine.compile=true"]), 1)
