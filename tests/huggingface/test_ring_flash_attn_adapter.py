"""ring-flash-attn's adapter: Transformers' models on its layout of packed sequences, against one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringflash import ArgumentError, RankMismatchError, UnsupportedError
from ringflash.ring_flash_attn import substitute_hf_flash_attn, update_ring_flash_attn_params
from ringflash.ring_flash_attn.adapters import hf_adapter

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 0.5},
    "gpt_oss": {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
}
LENGTHS = [7, 1, 12, 4]


@contextmanager
def untouched() -> Iterator[None]:
    """Afterwards Transformers and the adapter are what they were."""
    from transformers import AttentionInterface, AttentionMaskInterface

    with pytest.MonkeyPatch.context() as patch:
        for interface in (AttentionInterface, AttentionMaskInterface):
            patch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        patch.setattr(hf_adapter, "DATA_PARAMS", {})
        patch.setattr(hf_adapter, "_replaced", {})
        patch.setattr(hf_adapter, "_state", dict(hf_adapter._state))
        yield


def model_of(family: str, attention: str = "eager") -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight)
    return model


def gradients(model: torch.nn.Module, logits: Tensor, dout: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logits * dout).sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions (1, tokens), and the gradient of the logits (1, tokens, 64)."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (1, sum(LENGTHS)), generator=random)
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, places, torch.randn(1, sum(LENGTHS), 64, generator=random)


def boundaries() -> Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def forward_on_this_rank(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Logits of this rank's piece, and the gradient that belongs to them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    update_ring_flash_attn_params(boundaries(), dist.group.WORLD)
    ids, places, dout = (x.chunk(ranks, dim=1)[rank] for x in whole_batch())
    return model(input_ids=ids, position_ids=places, use_cache=False).logits, dout


def _equals_one_sequence_at_a_time(family: str, attention: str) -> None:
    with untouched():
        substitute_hf_flash_attn(dist.group.WORLD, heads_k_stride=1)
        alone, model = model_of(family), model_of(family, "eager" if "flash" in attention else attention)
        model.config._attn_implementation = attention  # without flash-attn, Transformers does not make such a model
        ids, places, dout = whole_batch()
        parts = zip(ids.split(LENGTHS, 1), places.split(LENGTHS, 1), strict=True)
        expected = torch.cat([alone(input_ids=i, position_ids=p, use_cache=False).logits for i, p in parts], dim=1)
        wanted = gradients(alone, expected, dout)
        logits, dout = forward_on_this_rank(model)
        assert_equal("logits", logits, expected.chunk(dist.get_world_size(), dim=1)[dist.get_rank()])
        for name, gradient in gradients(model, logits, dout).items():
            dist.all_reduce(gradient)
            assert_equal(name, gradient, wanted[name])


def assert_equal(name: str, found: Tensor, expected: Tensor) -> None:
    """To fp32's precision, relative to the largest element."""
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * size, f"{name} is off by {error}, its largest element is {size}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logits_and_gradients_are_those_of_one_sequence_at_a_time(pool, family: str, ranks: int) -> None:
    pool(ranks).run(_equals_one_sequence_at_a_time, family, hf_adapter.NAME, timeout=120)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_models_of_flash_attention_attend_over_the_ranks(pool, attention: str) -> None:
    pool(2).run(_equals_one_sequence_at_a_time, "llama", attention, timeout=120)


def _switched_off() -> None:
    from transformers import AttentionInterface

    calls = []

    def other(module: torch.nn.Module, query: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        calls.append(module.layer_idx)
        return query.transpose(1, 2), None

    with untouched():
        AttentionInterface.register("flash_attention_2", other)
        for _ in range(2):  # a second substitution does not take the first for what was there
            substitute_hf_flash_attn(None, 1)
        model = model_of("llama")
        model.config._attn_implementation = "flash_attention_2"
        hf_adapter.use_ring_attn(False)
        forward_on_this_rank(model)
        assert calls == [0, 1]
        model.set_attn_implementation(hf_adapter.NAME)
        with pytest.raises(UnsupportedError, match=r'set_attn_implementation\("sdpa"\)'):
            forward_on_this_rank(model)
        hf_adapter.use_ring_attn(True)
        forward_on_this_rank(model)
        assert calls == [0, 1]


def test_with_the_ring_switched_off_what_was_there_attends(pool) -> None:
    pool(2).run(_switched_off, timeout=120)


def _registered_later() -> None:
    from transformers import AttentionInterface

    with untouched():
        substitute_hf_flash_attn(None, 1)
        AttentionInterface.register("kernels-community/flash-attn2", lambda *_, **__: pytest.fail("attends alone"))
        model = model_of("llama")
        model.config._attn_implementation = "kernels-community/flash-attn2"
        forward_on_this_rank(model)


def test_kernels_of_the_hub_that_are_registered_later_attend_over_the_ranks(pool) -> None:
    pool(2).run(_registered_later, timeout=120)


def _refused(call: Callable, message: str) -> None:
    with untouched():
        substitute_hf_flash_attn(None, heads_k_stride=1)
        model = model_of("llama", hf_adapter.NAME)
        with pytest.raises(ArgumentError, match=message):
            call(model)
        forward_on_this_rank(model)  # ranks are still in step


def _without_boundaries(model: torch.nn.Module) -> None:
    model(torch.ones(1, 4, dtype=torch.long))


def _with_boundaries(model: torch.nn.Module, tokens: int, batch: int = 1, **settings: object) -> None:
    update_ring_flash_attn_params(boundaries(), None)
    model(torch.ones(batch, tokens, dtype=torch.long), **settings)


def _unsharded(model: torch.nn.Module) -> None:
    _with_boundaries(model, 24)


def _rows(model: torch.nn.Module) -> None:
    _with_boundaries(model, 12, batch=2)


def _padded(model: torch.nn.Module) -> None:
    _with_boundaries(model, 12, attention_mask=torch.tensor([[1] * 11 + [0]]))


def _cached(model: torch.nn.Module) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    _with_boundaries(model, 12, past_key_values=cache, use_cache=True)
    _with_boundaries(model, 12, past_key_values=cache, use_cache=True)


def _chunked(model: torch.nn.Module) -> None:
    model.config.attention_chunk_size = 4
    try:
        _with_boundaries(model, 12)
    finally:
        del model.config.attention_chunk_size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_without_boundaries, r"call update_ring_flash_attn_params\(cu_seqlens, group\) first"),
        (_unsharded, "input_ids has 24 tokens; cu_seqlens ends at 24, of which each of 2 ranks holds 12"),
        (_rows, "the batch has 2 rows"),
        (_padded, "attention_mask marks padding"),
        (_cached, "keys of 24 tokens and queries of 12; .* use_cache=False"),
        (_chunked, "attention_chunk_size"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_batches_that_would_give_other_numbers_are_refused(pool, call: Callable, message: str) -> None:
    pool(2).run(_refused, call, message, timeout=120)


def _refused_once() -> str:
    with untouched():
        substitute_hf_flash_attn(None, heads_k_stride=1)
        model = model_of("llama", hf_adapter.NAME)
        with pytest.raises((ArgumentError, RankMismatchError)) as raised:
            _with_boundaries(model, 12, batch=1 + dist.get_rank())
        forward_on_this_rank(model)
        return f"{type(raised.value).__name__}: {raised.value}"


def test_what_one_rank_refuses_reaches_the_other(pool) -> None:
    first, second = pool(2).run(_refused_once, timeout=120)
    assert second.startswith("ArgumentError: the batch has 2 rows")
    assert first == f"RankMismatchError: rank 1 raised an error instead of coming to attention: {second}"


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_that_is_none_is_refused(stride: int) -> None:
    with pytest.raises(ArgumentError, match=f"heads_k_stride={stride}"):
        substitute_hf_flash_attn(None, stride)
