"""Arguments as wrappers pass them on: taken in flash-attn's meaning, or refused by name before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringflash import DistributedFlashAttention
from ringflash.errors import ArgumentError, UnsupportedError
from ringflash.flash_attn import flash_attn_interface as interface
from ringflash.flash_attn.bert_padding import unpad_input
from ringflash.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from ringflash.functional import attention

X = torch.randn(2, 6, 3, 4, 16, generator=torch.Generator().manual_seed(0))
Q, K, V = X.unbind(2)
EDGES = torch.tensor([0, 5, 12], dtype=torch.int32)
LONGEST = {"max_seqlen_q": 7, "max_seqlen_k": 7}
BOUNDS = {"cu_seqlens_q": EDGES, "cu_seqlens_k": EDGES, **LONGEST}
CACHES = {"k_cache": torch.zeros(2, 9, 4, 16), "v_cache": torch.zeros(2, 9, 4, 16)}
ANGLES = torch.arange(7.0)[:, None] * torch.ones(8)
TABLES = {"cos": ANGLES.cos(), "sin": ANGLES.sin()}

CALLS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "attention": (attention, {"query": Q, "key": K, "value": V}),
    "module": (DistributedFlashAttention(), {"query": Q, "key": K, "value": V}),
    "flash_attn_func": (interface.flash_attn_func, {"q": Q, "k": K, "v": V}),
    "flash_attn_kvpacked_func": (interface.flash_attn_kvpacked_func, {"q": Q, "kv": X[:, :, 1:]}),
    "flash_attn_qkvpacked_func": (interface.flash_attn_qkvpacked_func, {"qkv": X}),
    "flash_attn_varlen_func": (
        interface.flash_attn_varlen_func,
        {"q": Q.flatten(0, 1), "k": K.flatten(0, 1), "v": V.flatten(0, 1), **BOUNDS},
    ),
    "flash_attn_varlen_kvpacked_func": (
        interface.flash_attn_varlen_kvpacked_func,
        {"q": Q.flatten(0, 1), "kv": X[:, :, 1:].flatten(0, 1), **BOUNDS},
    ),
    "flash_attn_varlen_qkvpacked_func": (
        interface.flash_attn_varlen_qkvpacked_func,
        {"qkv": X.flatten(0, 1), "cu_seqlens": EDGES, "max_seqlen": 7},
    ),
    "flash_attn_with_kvcache": (
        interface.flash_attn_with_kvcache,
        {"q": Q, **CACHES, "k": K, "v": V, "cache_seqlens": 3},
    ),
    "apply_rotary_emb": (apply_rotary_emb, {"x": Q, **TABLES}),
    "apply_rotary_emb_packed": (
        apply_rotary_emb,
        {"x": Q.flatten(0, 1), **TABLES, "cu_seqlens": EDGES, "max_seqlen": 7},
    ),
    "apply_rotary_emb_qkv_": (apply_rotary_emb_qkv_, {"qkv": X, **TABLES}),
    "apply_rotary_emb_qkv_of_four_dimensions": (apply_rotary_emb_qkv_, {"qkv": X[:, :, 0], **TABLES, "num_heads_q": 2}),
    "apply_rotary_emb_kv_": (apply_rotary_emb_kv_, {"kv": X[:, :, 1:], **TABLES}),
    "RotaryEmbedding": (RotaryEmbedding(16), {"qkv": X}),
    "unpad_input": (unpad_input, {"hidden_states": Q, "attention_mask": torch.ones(2, 6)}),
}
LAYOUT = {"group", "partition", "sharding", "mask", "cu_seqlens", "query_cu_seqlens", "seqlen", "key_seqlen"}
"""What says how tokens lie on ranks: other libraries' wrappers do not know it."""


def _parameters(call: str) -> dict[str, inspect.Parameter]:
    function, _ = CALLS[call]
    function = function.forward if isinstance(function, torch.nn.Module) else function
    own = LAYOUT if call in ("attention", "module") else set()
    return {name: p for name, p in inspect.signature(function).parameters.items() if name not in own}


def _run(call: str, changed: dict[str, Any]) -> Any:
    function, good = CALLS[call]
    copied = {name: x.clone() if isinstance(x, Tensor) else x for name, x in (good | changed).items()}
    torch.manual_seed(0)
    return function(**copied)


ODD = {
    "none": None,
    "list": [1.0, 2.0],
    "text": "0.5",
    "object": object(),
    "tensor": torch.tensor(0.5),
    "integers": torch.tensor([3, 3]),
    "float": 1.5,
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("call", CALLS)
def test_whatever_is_passed_for_an_argument_is_taken_or_refused_by_its_name(call: str, odd: str) -> None:
    for name in _parameters(call):
        said = _refusal(call, {name: ODD[odd]})
        # Of tensors that do not go together either may be named.
        names = _parameters(call) if isinstance(ODD[odd], Tensor) else [name]
        assert said is None or any(name in said for name in names), f"{name}={ODD[odd]}: {said}"


def _refusal(call: str, changed: dict[str, Any]) -> str | None:
    try:
        _run(call, changed)
    except (ArgumentError, UnsupportedError) as error:
        return str(error)
    return None


NEEDED = {"kernel", "seqlen_offset", "seqlen_offsets"}
"""Refused if None; flash-attn has no meaning for it."""


@pytest.mark.parametrize("call", CALLS)
def test_none_is_what_an_argument_is_that_is_not_passed(call: str) -> None:
    expected = _run(call, {})
    _, good = CALLS[call]
    for name, parameter in _parameters(call).items():
        if parameter.default is inspect.Parameter.empty or name in good or name in NEEDED:
            continue
        found = _run(call, {name: None})
        for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, msg=f"{name}=None")


def test_none_is_none_for_a_module_too() -> None:
    found = DistributedFlashAttention(scale=None, softcap=None, dropout=None).train()(Q, K, V)
    assert torch.equal(found, _run("module", {}))


def test_bounds_of_a_window_may_be_none() -> None:
    for given, meant in (((None, None), (-1, -1)), ((3, None), (3, -1)), ([None, 2], (-1, 2))):
        found = _run("flash_attn_func", {"window_size": given})
        assert torch.equal(found, _run("flash_attn_func", {"window_size": meant}))


FORMS: dict[str, Callable[[int], Any]] = {
    "none": lambda length: None,
    "tensor": torch.tensor,
    "of one element": lambda length: torch.tensor([length], dtype=torch.int32),
    "numpy": np.int64,
}
VARLEN = [call for call in CALLS if "varlen" in call]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", VARLEN)
def test_the_longest_sequence_may_be_unknown_or_a_tensor(call: str, form: str) -> None:
    longest = {name: FORMS[form](7) for name in CALLS[call][1] if name.startswith("max_seqlen")}
    assert torch.equal(_run(call, longest), _run(call, {}))
    if form != "none":
        for name in longest:
            with pytest.raises(ArgumentError, match=f"{name}=6; the longest sequence has 7"):
                _run(call, {name: FORMS[form](6)})


COMPILED = [(call, form) for call in VARLEN for form in ("none", "tensor", "of one element")]
COMPILED += [("apply_rotary_emb_packed", "tensor")]  # which flash-attn refuses without a longest sequence


@pytest.mark.parametrize(("call", "form"), COMPILED)
def test_the_longest_sequence_may_be_unknown_or_a_tensor_in_compiled_code(call: str, form: str) -> None:
    torch.compiler.reset()
    function, good = CALLS[call]
    longest = {name: FORMS[form](7) for name in good if name.startswith("max_seqlen")}
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**good | longest), function(**good))


def test_where_a_size_depends_on_the_longest_sequence_a_tensor_is_read_and_none_refused_by_name() -> None:
    probabilities = {"dropout_p": 0.5, "return_attn_probs": True}
    expected = _run("flash_attn_varlen_func", probabilities)
    found = _run("flash_attn_varlen_func", probabilities | {name: torch.tensor(7) for name in LONGEST})
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    pages = {"block_table": torch.tensor([[0], [1]], dtype=torch.int32)}
    pages |= {"k": torch.cat([K, K], 1), "v": torch.cat([V, V], 1)}
    paged = _run("flash_attn_varlen_func", pages)
    assert torch.equal(_run("flash_attn_varlen_func", pages | {"max_seqlen_k": torch.tensor(7)}), paged)
    for name in LONGEST:
        with pytest.raises(ArgumentError, match=f"{name} is None; S_dmask needs it as an integer"):
            _run("flash_attn_varlen_func", probabilities | {name: None})
    with pytest.raises(ArgumentError, match="max_seqlen_k is None; block_table needs it as an integer"):
        _run("flash_attn_varlen_func", pages | {"max_seqlen_k": None})


@pytest.mark.parametrize("call", ["attention", "module", *(call for call in CALLS if call.endswith("_func"))])
def test_a_batch_of_no_tokens_gives_no_rows_and_a_gradient(call: str) -> None:
    function, good = CALLS[call]
    rows = slice(0) if "varlen" in call else (slice(None), slice(0))
    empty = {
        name: x[rows].clone().requires_grad_() for name, x in good.items() if isinstance(x, Tensor) and x is not EDGES
    }
    edges = {name: torch.zeros_like(x) for name, x in good.items() if name.startswith("cu_seqlens")}
    out = function(**good | edges | empty)
    out = out[0] if isinstance(out, tuple) else out
    assert out.numel() == 0
    for gradient, x in zip(torch.autograd.grad(out.sum(), list(empty.values())), empty.values(), strict=True):
        assert gradient.shape == x.shape


@pytest.mark.parametrize("call", ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"])
def test_a_batch_of_no_sequences_is_refused_by_flash_attns_name(call: str) -> None:
    empty = {name: x[:0] for name, x in CALLS[call][1].items()}
    with pytest.raises(ArgumentError, match=r"^q has shape \(0, 6, 4, 16\); the batch must hold at least one sequence"):
        _run(call, empty)


@pytest.mark.gpu
def test_a_longest_sequence_on_a_gpu_is_not_waited_for() -> None:
    good = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in CALLS["flash_attn_varlen_func"][1].items()}
    good |= {name: good[name].half() for name in "qkv"}
    expected = interface.flash_attn_varlen_func(**good)
    longest = {name: torch.tensor(7, device="cuda") for name in LONGEST}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = interface.flash_attn_varlen_func(**good | longest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
