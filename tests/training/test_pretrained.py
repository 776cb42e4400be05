"""A model of a Hugging Face folder: read parameter by parameter, and trained as one device trains it."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import recipe
import torch
import torch.distributed as dist
from folders import write_folder
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash.configs.schema import EngineConfig, LoraConfig, ModelConfig, RopeParametersConfig
from ringflash.errors import ArgumentError, DataError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.corpus.chats import ChatTokenizer
from ringflash.training.engines.create import create_engine
from ringflash.training.memory import rows
from ringflash.training.model import pretrained
from ringflash.training.model.folder import FolderWeights
from ringflash.training.model.pretrained import Pretrained, changed, empty_model, positions_in_documents, read_config

sys.path.append(str(Path(__file__).parent.parent / "huggingface"))

import itertools

from families import FAMILIES, build

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Of these the files hold each expert by itself, and the model all of them in one parameter."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40}
    return write_folder(tmp_path_factory.mktemp("experts"), model_type="mixtral", **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_one_by_one_as_from_pretrained_reads_them(tmp_path, family):
    build(family, "eager").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = empty_model(read_config(tmp_path), "")
    assert all(weight.is_meta for weight in model.parameters())
    weights = FolderWeights(tmp_path, model)
    for name, weight in expected.named_parameters():
        assert torch.equal(weights.read(name), weight), name
    buffers = dict(expected.named_buffers())
    assert {name for name, _ in model.named_buffers()} == buffers.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_base_models_folder_and_weights_under_a_tied_name_are_read_too(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.save_pretrained(tmp_path / "base")  # names without the first "model."
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    empty = empty_model(read_config(tmp_path / "base"), "")
    weights = FolderWeights(tmp_path / "base", empty)
    for name, weight in model.named_parameters():
        assert torch.equal(weights.read(name), weight), name


# Training


def _steps(
    path,
    name,
    degree,
    micro_batch=recipe.SEQUENCES,
    dtype=torch.float32,
    memory="keep",
    last=2,
    lora=None,
    settings=None,
):
    """As recipe.steps: [(loss, gradient norm), ...] and the engine's state, of the same batches."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // degree, degree), mesh_dim_names=("data", "sequence"))
    group, data_rank, data_ranks = mesh["sequence"].get_group(), mesh["data"].get_local_rank(), world // degree
    model = Pretrained(ModelConfig(path=str(path)), group, "zigzag", dtype, recipe.SEQLEN, lora)
    accumulation = recipe.SEQUENCES // (micro_batch * data_ranks)
    engine = create_engine(
        model,
        torch.device("cpu"),
        EngineConfig(name, memory=memory, **(settings or {})),
        recipe.OPTIMIZER,
        accumulation,
    )
    curve = []
    for step in range(last):
        mine = recipe.batches(step)[data_rank::data_ranks]
        micro = [recipe.together(mine[i : i + micro_batch]) for i in range(0, len(mine), micro_batch)]
        loss, norm, _ = engine.train_step([model.shard(batch) for batch in micro], recipe.OPTIMIZER.lr)
        curve.append((loss.item(), norm.item()))
    losses = engine.evaluate(model.shard(recipe.batches(9)[0]))
    sums = losses.sum()[None]
    dist.all_reduce(sums)
    state = {name.replace("/model.", "/"): x.detach().clone() for name, x in recipe.whole(engine).items()}
    return curve, state, sums.item() / world * degree


def _plain(path, last=2, adapt=lambda model: model):
    """Transformers and torch on one device, each document in a row of its own."""
    model = adapt(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).train()
    config, learned = recipe.OPTIMIZER, {name: x for name, x in model.named_parameters() if x.requires_grad}
    groups = [
        {"params": [x for x in learned.values() if x.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [x for x in learned.values() if x.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    curve = []
    for step in range(last):
        losses = torch.cat([_document_losses(model, batch) for batch in recipe.batches(step)])
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adam.step()
        adam.zero_grad()
        curve.append((losses.mean().item(), norm.item()))
    state = {}
    for name, weight in learned.items():
        state[f"weight/{name}"] = weight.detach()
        state |= {f"{moment}/{name}": adam.state[weight][moment] for moment in ("exp_avg", "exp_avg_sq")}
    return curve, state, _document_losses(model, recipe.batches(9)[0]).sum().item()


def _document_losses(model, batch):
    bounds, losses = batch["cu_seqlens"], []
    for start, stop in itertools.pairwise(bounds):
        ids = batch["input_ids"][:, start:stop]
        if stop - start > 1:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses)


def _assert_same(result, expected):
    torch.testing.assert_close(torch.tensor(result[0]), torch.tensor(expected[0]), rtol=2e-5, atol=2e-5)
    assert result[1].keys() == expected[1].keys()
    for name, tensor in result[1].items():
        largest = expected[1][name].abs().max().item()
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=5e-5 * largest, msg=lambda m, n=name: n + m)
    assert result[2] == pytest.approx(expected[2], rel=2e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_train_and_evaluate_a_folder_as_transformers_does_on_one_device(pool, folder, name):
    expected = _plain(folder)
    for result in pool(2).run(_steps, folder, name, degree=2):
        _assert_same(result, expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_data_and_sequence_ranks_train_a_mixture_of_experts_as_one_device_does(pool, experts, name):
    expected = _plain(experts)
    for result in pool(4).run(_steps, experts, name, degree=2, micro_batch=1):
        _assert_same(result, expected)


RELATIVE = [name for name in FAMILIES if name not in ("llama_dynamic_rope", "phi3_long_rope")]
"""Families whose rotary embedding does not depend on what else is in the batch."""


@pytest.mark.parametrize("family", RELATIVE)
def test_two_ranks_learn_from_any_family_what_one_device_learns(pool, tmp_path, family):
    build(family, "eager").save_pretrained(tmp_path)
    (curve, _, losses), _ = pool(2).run(_steps, tmp_path, "ddp", degree=2, last=1)
    expected, _, expected_losses = _plain(tmp_path, last=1)
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-3)


@pytest.mark.parametrize("memory", ["recompute", "offload", "offload_pairs"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_what_is_kept_of_blocks_changes_no_bit(pool, folder, name, memory):
    (expected,), (found,) = (pool(1).run(_steps, folder, name, 1, memory=each, last=1) for each in ("keep", memory))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])


def _steps_of_tiles(tokens, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", tokens * 48)
        return _steps(*args, **options)


@pytest.mark.parametrize("tile", [201, 203], ids=["in tiles", "whole"])
def test_ranks_of_which_one_has_more_tokens_than_a_tile_train_as_one_device_does(pool, folder, tile):
    """They have 204 and 200; ZeRO 2 sums gradients in the order in which they are ready, so that is to be the same."""
    for result in pool(2).run(_steps_of_tiles, tile, folder, "zero2", 2, memory="recompute"):
        _assert_same(result, _plain(folder))


def _steps_in_tiles(path, name, policy, lora=None):
    calls, run = [], rows.tiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TILE_ELEMENTS, "cpu", 1 << (10 - dist.get_rank()))
        patch.setattr(pretrained, "tiled", lambda *given: calls.append(1) or run(*given))
        return (*_steps(path, name, 2, memory=policy, last=1, lora=lora), len(calls))


@pytest.mark.parametrize("family", RELATIVE)
def test_feed_forwards_of_any_family_learn_the_same_in_tiles(pool, tmp_path, family):
    build(family, "eager").save_pretrained(tmp_path)
    (expected, _), (found, _) = (pool(2).run(_steps_in_tiles, tmp_path, "ddp", each) for each in ("keep", "recompute"))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
    assert expected[3] == 0
    assert found[3] > 0 or not pretrained.feed_forwards(Pretrained(ModelConfig(path=str(tmp_path))).model)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, target_modules=["down_proj"])], ids=["all", "adapters"])
@pytest.mark.parametrize("name", ENGINES)
def test_ranks_with_different_numbers_of_tiles_learn_what_is_learned_without(pool, folder, name, lora):
    expected, found = (pool(2).run(_steps_in_tiles, folder, name, each, lora)[0] for each in ("keep", "offload"))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
    for key, tensor in found[1].items():
        largest = expected[1][key].abs().max().item()
        torch.testing.assert_close(tensor, expected[1][key], rtol=0, atol=2e-5 * largest)
    assert found[3] > 0


@pytest.mark.parametrize("family", RELATIVE)
def test_blocks_of_any_family_are_moved_to_the_host_and_computed_again(pool, tmp_path, family):
    build(family, "eager").save_pretrained(tmp_path)
    (expected, _), (found, _) = (
        pool(2).run(_steps, tmp_path, "ddp", 2, memory=each, last=1) for each in ("keep", "offload_pairs")
    )
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])
    divided, _ = pool(2).run(_steps, tmp_path, "fsdp2", 2, memory="offload_pairs", last=1)
    torch.testing.assert_close(torch.tensor(divided[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
    for key, tensor in expected[1].items():
        torch.testing.assert_close(divided[1][key], tensor, rtol=0, atol=2e-5 * tensor.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero3"])
def test_bf16_keeps_master_weights_in_fp32_and_rotates_by_frequencies_in_fp32(pool, folder, name):
    curve, state, _ = pool(2).run(_steps, folder, name, degree=2, dtype=torch.bfloat16)[0]
    expected, _, _ = _plain(folder)
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0.03, atol=0.03)
    weight = state["weight/model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def _live_bytes():
    storages = [
        x.untyped_storage()
        for x in gc.get_objects()
        if isinstance(x, torch.Tensor) and not x.is_meta and type(x) is not DTensor
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _most_bytes_while_loaded(path, name, share):
    """Of tensors, each time that a parameter has its values; at least this and at most that are right."""
    model = Pretrained(ModelConfig(path=str(path)))
    sizes = [4 * weight.numel() for weight in model.parameters()]
    whole, largest, most = sum(sizes), max(sizes), 0
    draw = model.initialise
    gc.collect()
    gc.freeze()  # what is there already does not count, and is not looked through

    def initialise(name, weight):
        nonlocal most
        draw(name, weight)
        most = max(most, _live_bytes())

    model.initialise = initialise
    create_engine(model, torch.device("cpu"), EngineConfig(name), recipe.OPTIMIZER)
    gc.unfreeze()
    return 0.9 * share * whole, most, share * whole + 3 * largest


@pytest.mark.parametrize(("name", "share"), [("ddp", 1), ("fsdp2", 0.5), ("zero3", 0.5)])
def test_zero3_holds_one_parameter_and_its_share_of_the_others_while_a_folder_is_loaded(pool, tmp_path, name, share):
    write_folder(tmp_path, num_hidden_layers=10, tie_word_embeddings=True)
    for at_least, most, at_most in pool(2).run(_most_bytes_while_loaded, tmp_path, name, share):
        assert at_least < most < at_most


def test_positions_restart_with_each_document_and_each_row():
    found = positions_in_documents([0, 3, 5, 8, 9], 2, 5)
    assert found.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]


# Longer contexts


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 24.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_theta": 5e5},
    ],
    ids=lambda rope: rope.get("rope_type", "theta"),
)
def test_rope_parameters_are_those_of_transformers(folder, rope):
    config = changed(read_config(folder), ModelConfig(rope_parameters=RopeParametersConfig(**rope)), 1024)
    assert config.max_position_embeddings == 1024
    expected = AutoConfig.from_pretrained(folder)
    more = {"original_max_position_embeddings": 128} if "rope_type" in rope else {}
    expected.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0} | rope | more
    expected.max_position_embeddings = 1024
    ours, theirs = (empty_model(each, "").model.rotary_emb for each in (config, expected))
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling
    assert not torch.equal(ours.inv_freq, empty_model(read_config(folder), "").model.rotary_emb.inv_freq)


def test_dynamic_rope_stretches_what_is_longer_than_the_context_that_the_model_was_trained_with(folder):
    rope = RopeParametersConfig(rope_type="dynamic", factor=4.0)
    rotary = empty_model(changed(read_config(folder), ModelConfig(rope_parameters=rope), 1024), "").model.rotary_emb
    width = 2 * len(rotary.inv_freq)
    for length, longer in ((128, 1), (1024, 4 * 1024 / 128 - 3)):  # as NTK-aware scaling was published for any length
        rotary(torch.zeros(1), torch.arange(length)[None])
        base = 10000.0 * longer ** (width / (width - 2))
        torch.testing.assert_close(rotary.inv_freq, base ** -(torch.arange(0, width, 2) / width))


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "yarn"}, "rope_type=yarn needs model.rope_parameters.factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_type=llama3 needs model.rope_parameters.low_freq_factor"),
        ({"factor": 2.0}, "factor=2.0 means nothing to rope_type=default, which takes rope_theta"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast=3.0 means nothing to rope_type=linear"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4},
            "short_factor has 1 numbers; allow",
        ),
    ],
)
def test_numbers_of_a_rotary_embedding_that_would_be_missed_or_ignored_are_refused(folder, rope, said):
    with pytest.raises(ArgumentError) as refused:
        changed(read_config(folder), ModelConfig(rope_parameters=RopeParametersConfig(**rope)), 1024)
    assert str(refused.value).startswith(f"model.rope_parameters.{said}")


def test_a_rotary_embedding_that_the_models_own_class_reads_as_another_is_refused(tmp_path):
    write_folder(tmp_path, model_type="phi3", pad_token_id=0)
    rope = RopeParametersConfig(rope_type="yarn", factor=4.0)
    with pytest.raises(ArgumentError, match=r"model\.rope_parameters\.rope_type=yarn: Phi3Config refuses it"):
        changed(read_config(tmp_path), ModelConfig(rope_parameters=rope), 1024)


def test_a_width_of_heads_that_config_json_leaves_open_is_worked_out_for_another_rotary_embedding(tmp_path):
    write_folder(tmp_path, model_type="mixtral", head_dim=None)
    rope = RopeParametersConfig(rope_type="yarn", factor=4.0)
    found = empty_model(changed(read_config(tmp_path), ModelConfig(rope_parameters=rope), 1024), "")
    assert found.model.rotary_emb.inv_freq.shape == (4,)


def test_another_type_of_rotary_embedding_rotates_the_same_part_of_a_head(tmp_path):
    write_folder(tmp_path, model_type="stablelm", partial_rotary_factor=0.5)
    rope = RopeParametersConfig(rope_type="linear", factor=4.0)
    before, after = (read_config(tmp_path), changed(read_config(tmp_path), ModelConfig(rope_parameters=rope), 128))
    slow, fast = (empty_model(each, "").model.rotary_emb.inv_freq for each in (after, before))
    torch.testing.assert_close(slow, fast / 4)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.path=nowhere"], "model.path=nowhere: no such folder; `hf download"),
        (["model.path={folder}", "model.hidden_size=64"], "model.hidden_size=64 beside model.path="),
        (["model=tiny", "model.path={folder}"], "or take model=pretrained"),
        (["model.path={folder}", "attention=sliding_window"], "attention.mask=sliding_window beside model.path="),
        (["model.path={folder}", "model.rope_scaling.factor=2"], "model.rope_scaling.factor=2.0 beside model.path="),
        (["model.rope_parameters.factor=2"], "model.rope_parameters.factor=2.0 is for model.path"),
        (["model=pretrained"], "model.hidden_size=0; allowed are 1 and more, or a folder in model.path"),
        (["model.path={folder}", "data.tokenizer=bytes"], "data.tokenizer=bytes beside model.path="),
        (["model.path={folder}", "train.seqlen=7"], "train.seqlen=7 is less than two tokens for each of the 4 ranks"),
        (
            ["model.path={folder}", "model.rope_parameters.rope_type=su"],
            "rope_type='su'; allowed are default, linear, dyn",
        ),
    ],
)
def test_keys_that_a_folder_does_not_go_with_are_refused_by_name(folder, overrides, said):
    config = load([override.format(folder=folder) for override in overrides])
    with pytest.raises(ArgumentError) as refused:
        check(config, 4)
    assert said in str(refused.value)


def test_what_is_not_installed_is_named_with_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("ringflash.training.extras.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"model\.path=.* needs transformers and accelerate: pip install 'ringfla"):
        check(load([f"model.path={folder}"]), 1)


def _break_file(folder):
    (folder / "model.safetensors").write_bytes(b"no")


def _leave_one_out(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def _name_an_absent_file(folder):
    index = {"weight_map": {"model.norm.weight": "model-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _change_config(**change):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))

    return write


def _damage(name, text):
    return lambda folder: (folder / name).write_text(text)


def _load(path):
    model = Pretrained(ModelConfig(path=str(path)))
    for name, weight in model.named_parameters():
        model.initialise(name, torch.empty_like(weight, device="cpu"))


@pytest.mark.parametrize(
    ("model_type", "shape", "said"),
    [
        ("mamba", {}, "is of type linear_attention"),
        ("minimax", {"num_local_experts": 2}, "is of type linear_attention"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "computes attention itself"),
        ("falcon", {}, "a falcon computes attention itself"),
    ],
)
def test_models_whose_packed_documents_would_see_each_other_are_refused_on_one_rank_too(
    tmp_path, model_type, shape, said
):
    write_folder(tmp_path, model_type=model_type, **shape)
    with pytest.raises(ArgumentError, match=rf"model\.path=.*{said}"):
        Pretrained(ModelConfig(path=str(tmp_path)))


def test_tensors_that_a_model_has_no_place_for_are_counted(tmp_path, folder):
    assert not Pretrained(ModelConfig(path=str(folder))).passed_over()
    shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older versions wrote
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert not Pretrained(ModelConfig(path=str(tmp_path / "copy"))).passed_over()
    _change_config(num_hidden_layers=1)(tmp_path / "copy")
    said = Pretrained(ModelConfig(path=str(tmp_path / "copy"))).passed_over()
    assert said.startswith(
        "passed over: tensors of model.path that the model has no place for (9, the first is model.la"
    )


def test_code_in_a_folder_is_never_run(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for change in ({"model_type": "evil"}, {}):
        _change_config(auto_map=names, **change)(tmp_path / "copy")
        with contextlib.suppress(DataError):  # what Transformers knows itself it takes from its own code
            _load(tmp_path / "copy")
    with contextlib.suppress(DataError):
        ChatTokenizer(str(tmp_path / "copy"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (_break_file, DataError, "model.safetensors: "),
        (lambda folder: (folder / "model.safetensors").unlink(), DataError, "no model.safetensors and no"),
        (_leave_one_out, DataError, "its files have no model.norm.weight, which a LlamaForCausalLM consists of"),
        (_name_an_absent_file, DataError, "names model-00009.safetensors, which is not there"),
        (_change_config(hidden_size=64), DataError, "by its config.json"),
        (_change_config(quantization_config={"quant_method": "mxfp4"}), DataError, "its weights are quantized"),
        (_change_config(attention_dropout=0.1), ArgumentError, "attention has dropout"),
        (_change_config(model_type="xyz"), DataError, "cannot read its config.json"),
        (_change_config(model_type="t5"), ArgumentError, "model.path="),
        (_change_config(num_attention_heads=3), DataError, "cannot read its config.json: Class validation error"),
        (_change_config(hidden_size=-4), ArgumentError, "its config.json gives no model: "),
        (_change_config(hidden_size="32"), DataError, "expected int, got str"),
        (_change_config(hidden_act="what"), ArgumentError, "its config.json gives no model: KeyError: 'what'"),
        (_damage("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), DataError, "index.json: TypeError("),
        (_damage("generation_config.json", "[]"), DataError, "generation_config.json holds no object; copy it anew"),
        (_damage("generation_config.json", "{"), DataError, "generation_config.json: Expecting property name"),
    ],
    ids=lambda value: None if callable(value) or isinstance(value, type) else value[:20],
)
def test_a_folder_that_cannot_be_trained_is_refused_with_what_is_wrong(tmp_path, folder, damage, error, said):
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(error) as refused:
        _load(tmp_path / "copy")
    assert said in str(refused.value)
    assert "model.path" in str(refused.value)
