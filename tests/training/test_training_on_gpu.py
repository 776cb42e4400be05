"""Training on a GPU: each engine in bf16 follows the fp32 run on a CPU, and goes on from its checkpoint."""

from __future__ import annotations

import dataclasses
import gc
import json

import pytest
import recipe
import torch
import torch.distributed as dist

from ringflash import Sharding, shard_batch
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.checkpoint.saving import Saver
from ringflash.training.engines.base import Piece
from ringflash.training.memory import rows

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def _one_gpu():
    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    # Runs on the CPU have the other half of the group.
    backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("memory", ["offload", "auto"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_bf16_follows_the_cpu_run_and_resumes(tmp_path, name, memory):
    _follows_and_resumes(tmp_path, name, memory)


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("settings", [{"offload": True}, {"reduce": "bf16"}, {"compile": True}], ids=str)
def test_fsdp2_on_the_host_in_bf16_or_compiled_follows_the_cpu_run_and_resumes(tmp_path, settings):
    _follows_and_resumes(tmp_path, "fsdp2", "offload", settings)


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_on_the_host_follows_the_cpu_run_and_resumes(tmp_path, name):
    on_host = {"offload_optimizer": {"device": "cpu"}}
    if name == "zero3":
        on_host["offload_param"] = {"device": "cpu"}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": on_host}))
    _follows_and_resumes(tmp_path, name, "offload", {"deepspeed": str(path)})


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize(("name", "memory"), [("ddp", "auto"), ("fsdp2", "offload_pairs"), ("zero3", "offload")])
@pytest.mark.parametrize("rounds", [True, False], ids=["in rounds", "at once"])
def test_blocks_by_rows_follow_the_cpu_run_and_resume(tmp_path, monkeypatch, name, memory, rounds):
    monkeypatch.setitem(rows.TILE_ELEMENTS, "cuda", 128 * 48)  # 404 tokens in four parts
    if not rounds:  # as on ranks that share a sequence
        monkeypatch.setattr(Sharding, "query_rounds", lambda *_: None)
    _follows_and_resumes(tmp_path, name, memory)


def _follows_and_resumes(tmp_path, name, memory, settings=None):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    options = {"degree": 1, "device": "cuda", "dtype": torch.bfloat16, "memory": memory, "settings": settings}
    expected, weights = recipe.plain(last=4)
    curve, state = recipe.steps(name, last=4, **options)
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0.03, atol=0.03)
    for key in ("weight/embed_tokens.weight", "weight/layers.0.mlp.up_proj.weight"):
        assert (state[key].cpu() - weights[key]).norm() < 0.05 * weights[key].norm()
    recipe.steps(name, last=2, folder=str(tmp_path), **options)
    resumed, _ = recipe.steps(name, first=2, last=4, resume=str(tmp_path / "step-00000002"), **options)
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(curve[2:]), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("_one_gpu")
def test_what_is_written_beside_training_is_what_was_there_when_it_began(tmp_path):
    device = torch.device("cuda", 0)
    pieces, expected = [], {}
    for number, size in enumerate((3, 1 << 27, 5)):  # the second one is longer than a slab of page-locked memory
        tensor = torch.rand(size, device=device)
        pieces.append(Piece(f"weight/{number}", 0, size, lambda tensor=tensor: tensor))
        expected[f"weight/{number}"] = tensor.cpu()
    sizes = {piece.name: (piece.size,) for piece in pieces}
    with Saver(tmp_path, device, keep=1) as saver:
        saver.reserve(4 * sum(piece.size for piece in pieces))
        assert saver.news() == []
        saver.begin(1, pieces, sizes, {})
        saver.protect()
        for piece in pieces:
            piece.take().zero_()
    assert saver.news()[0].startswith(f"saved {tmp_path / 'step-00000001'}: training waited for ")
    found = Checkpoint(tmp_path / "step-00000001")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_checkpoint_that_the_next_step_is_beside_holds_what_was_there_before_it(tmp_path, name):
    from ringflash.configs.schema import EngineConfig
    from ringflash.training.engines.create import create_engine

    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    device = torch.device("cuda", 0)
    engine = create_engine(
        recipe.build(device="meta", dtype=torch.bfloat16), device, EngineConfig(name), recipe.OPTIMIZER
    )
    batch = recipe.together(recipe.batches(0))
    batch["input_ids"] = batch["input_ids"].to(device)
    with Saver(tmp_path, device, keep=1) as saver:
        saver.reserve(1 << 20)
        engine.before_update = saver.protect
        engine.train_step([shard_batch(batch)], 1e-2)
        expected = {piece.name: piece.take().cpu() for piece in engine.pieces()}
        torch.cuda._sleep(int(1e9))  # so that the copy begins when the next step has long been asked for
        saver.begin(1, engine.pieces(), engine.sizes(), {})
        engine.train_step([shard_batch(batch)], 1e-2)
    found = recipe.stored(tmp_path / "step-00000001")
    assert all(torch.equal(found[name].flatten(), tensor) for name, tensor in expected.items())
    assert not all(torch.equal(piece.take().cpu(), expected[piece.name]) for piece in engine.pieces())


@pytest.mark.usefixtures("_one_gpu")
def test_fp32_gradients_are_those_of_the_cpu():
    gradients = []
    for device in ("cpu", "cuda"):
        model = recipe.build(device=device)
        batch = recipe.together(recipe.batches(0))
        batch["input_ids"] = batch["input_ids"].to(device)
        model(**shard_batch(batch)).backward()
        gradients.append({name: weight.grad.cpu() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-3 * largest)


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("lora", [0, 4], ids=["whole", "adapters"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_hugging_face_folder_in_bf16_follows_its_run_in_fp32_on_the_cpu(tmp_path, name, lora):
    pytest.importorskip("transformers")
    from folders import write_folder

    from ringflash.configs.schema import EngineConfig, LoraConfig, ModelConfig
    from ringflash.training.engines.create import create_engine
    from ringflash.training.model.pretrained import Pretrained

    path, curves = write_folder(tmp_path, tie_word_embeddings=True), []
    for device, engine_name, dtype in (("cpu", "ddp", torch.float32), ("cuda", name, torch.bfloat16)):
        adapters = LoraConfig(rank=lora)
        model = Pretrained(ModelConfig(path=str(path)), dtype=dtype, lora=adapters)
        engine = create_engine(
            model, torch.device(device), EngineConfig(engine_name, memory="offload"), recipe.OPTIMIZER
        )
        curve = []
        for step in range(4):
            shard = model.shard(recipe.together(recipe.batches(step)))
            shard["sharding"].prepare(torch.device(device))
            shard = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in shard.items()}
            curve.append([float(x) for x in engine.train_step([shard], recipe.OPTIMIZER.lr)[:2]])
        curves.append([*curve, [float(engine.evaluate(shard).sum()) / 400, 0.0]])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=0.04, atol=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_in_tiles_are_as_exact_as_torchs_own(dtype, monkeypatch):
    from ringflash.training.memory import rows

    monkeypatch.setitem(rows.TILE_ELEMENTS, "cuda", 1 << 16)
    torch.manual_seed(0)
    x, scale, *weights = (torch.randn(*size) for size in ((1, 700, 64), (64,), (96, 64), (96, 64), (64, 96)))
    angle = torch.randn(1, 700, 1, 8)

    def run(x, scale, gate, up, down, cos, sin, parts):
        norm, rotate, swiglu = parts
        y = rotate(norm(x, scale).unflatten(2, (4, 16)), cos, sin).flatten(2)
        return swiglu(y, gate, up, down)

    def rotated(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    plain = (
        lambda x, scale: torch.nn.functional.rms_norm(x, scale.shape, scale, 1e-5),
        rotated,
        lambda x, gate, up, down: (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T,
    )
    ours = (lambda x, scale: rows.rms_norm(x, scale, 1e-5), rows.rotate, rows.swiglu)
    results = []
    for device, kind, parts in (("cpu", torch.float64, plain), ("cuda", dtype, plain), ("cuda", dtype, ours)):
        inputs = [each.to(dtype).to(device, kind).requires_grad_() for each in (x, scale, *weights)]
        angles = [each.to(device, torch.promote_types(kind, torch.float32)) for each in (angle.cos(), angle.sin())]
        out = run(*inputs, *angles, parts)
        gradients = torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
        results.append([each.detach().cpu().double() for each in (out, *gradients)])
    exact, torchs, found = results
    for a, b, c in zip(exact, torchs, found, strict=True):
        assert (c - a).norm() <= 2 * (b - a).norm() + 1e-6 * a.norm()


def test_moments_in_8_bits_come_back_as_they_were_on_gpus():
    pytest.importorskip("bitsandbytes")
    from ringflash.training.engines import eight_bit
    from ringflash.training.engines.optimizer import optimizers

    def made():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(100, 130), torch.nn.Linear(130, 90)).cuda()
        return model, optimizers(model, dataclasses.replace(recipe.OPTIMIZER, name="adamw_8bit"))

    (model, (first, _)), (fresh, (second, _)) = made(), made()
    for step in range(3):
        model(torch.randn(64, 100, device="cuda")).square().sum().backward()
        first.step()
        first.zero_grad()
        for weight, other in zip(model.parameters(), fresh.parameters(), strict=True):
            if weight.dim() == 2:
                kept = {name: kept.cpu() for name, kept in eight_bit.exported(first.state[weight]).items()}
                eight_bit.restore(second.state[other], kept, step + 1)
                for name in ("step", "state1", "state2", "absmax1", "absmax2"):
                    before, after = (torch.as_tensor(o.state[w][name]) for o, w in ((first, weight), (second, other)))
                    assert torch.equal(before, after), name


def _peaks(model, config, steps):
    """Bytes that each of some steps on one document has in use at once."""
    from ringflash.training.engines.create import create_engine

    tokens, device, found = config.train.seqlen, torch.device("cuda", 0), []
    gc.collect()  # models of earlier tests are in cycles: what is let go of from here on would count as less
    before = torch.cuda.memory_allocated()
    engine = create_engine(model, device, config.engine, config.optimizer)
    ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    shard = model.shard({"input_ids": ids, "cu_seqlens": [0, tokens]})
    shard["sharding"].prepare(device)
    shard = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in shard.items()}
    for _ in range(steps):
        torch.cuda.reset_peak_memory_stats()
        engine.train_step([shard], 1e-4)[0].item()
        found.append(torch.cuda.max_memory_allocated() - before)
    return found


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("memory", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_a_step_takes_as_much_of_a_gpu_as_is_estimated(name, memory):
    from ringflash.training.config.composing import load
    from ringflash.training.estimate.hardware import Hardware, card_of
    from ringflash.training.estimate.step import estimate
    from ringflash.training.memory.available import available_bytes
    from ringflash.training.model.create import create_model

    keys = [f"engine={name}", f"engine.memory={memory}", "engine.precision=bf16", "train.seqlen=65536"]
    config = load(["model=llama3_1b", "model.num_hidden_layers=8", *keys])
    expected = estimate(config, Hardware(1, card_of(torch.device("cuda", 0)), available_bytes()))
    _, found = _peaks(create_model(config, 257, dist.group.WORLD), config, 2)  # the first makes the optimizer's state
    assert found == pytest.approx(expected.peak, rel=0.1)


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize(
    ("name", "memory", "lora"),
    [
        ("ddp", "keep", 0),
        ("ddp", "recompute", 0),
        ("ddp", "offload", 0),
        ("fsdp2", "keep", 0),
        ("fsdp2", "recompute", 16),
        ("fsdp2", "offload_pairs", 0),
        ("zero3", "keep", 16),
        ("zero3", "recompute", 0),
    ],
)
def test_a_step_of_a_folder_takes_as_much_of_a_gpu_as_is_estimated(tmp_path, name, memory, lora):
    transformers = pytest.importorskip("transformers")
    if lora:
        pytest.importorskip("peft")
    if name == "zero3":
        pytest.importorskip("deepspeed")
    from ringflash.training.config.composing import load
    from ringflash.training.estimate.hardware import Hardware, card_of
    from ringflash.training.estimate.step import estimate
    from ringflash.training.memory.available import available_bytes
    from ringflash.training.model.pretrained import Pretrained

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}
    transformers.LlamaConfig(**shape).save_pretrained(tmp_path)
    keys = [f"engine={name}", f"engine.memory={memory}", "engine.precision=bf16", "train.seqlen=32768"]
    config = load([f"model.path={tmp_path}", f"lora.rank={lora}", *keys])
    expected = estimate(config, Hardware(1, card_of(torch.device("cuda", 0)), available_bytes()))
    model = Pretrained(config.model, dist.group.WORLD, dtype=torch.bfloat16, lora=config.lora, read=False)
    model.initialise = lambda _, weight: weight.normal_(std=0.02)
    *_, found = _peaks(model, config, 3)
    assert found == pytest.approx(expected.peak, rel=0.1)


@pytest.mark.usefixtures("_one_gpu")
def test_ddp_holds_gradients_once_when_it_lays_them_out_anew_in_its_second_step():
    from ringflash.training.config.composing import load
    from ringflash.training.model.create import create_model

    keys = ["model.num_hidden_layers=2", "engine=ddp", "engine.precision=bf16", "train.seqlen=4096"]
    config = load(["model=llama3_1b", *keys])
    _, second, third = _peaks(create_model(config, 257, dist.group.WORLD), config, 3)
    assert second < 1.02 * third
