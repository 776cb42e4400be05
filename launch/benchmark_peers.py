"""The libraries that suite `kernels` times beside ours: query, key, value (B, S, H, D) to out (B, S, H, D)."""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from ringflash.launch.benchmark_kernels import Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FASTEST = ("cuDNN", "FlashAttention-3", "FlashAttention-4")
"""Those that ours are held against."""


def missing() -> list[str]:
    """A line for each peer that is not installed."""
    packages = {
        "FlashAttention-3": ("flash_attn_interface", "flash_attn3_jax"),
        "FlashAttention-4": ("flash_attn.cute",),
    }
    return [
        f"{name} is left out: none of its packages is installed ({', '.join(names)})"
        for name, names in packages.items()
        if not any(map(installed, names))
    ]


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a submodule is missing
        return False


def cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, grouped: bool = False) -> Tensor:
    """What ships in torch."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, query, key, value, causal, grouped)


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """What ships in torch under the name of flash."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, query, key, value, causal, False)


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, causal: bool, grouped: bool) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def flex(causal: bool, length: int) -> Attend:
    """FlexAttention; compiled for each shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device="cuda")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)

    return attend


def flash_attention_3(case: Case) -> dict[str, Attend]:
    """From its own package; at most by one entry."""
    if case.documents or not installed("flash_attn_interface"):
        return {}
    function = import_module("flash_attn_interface").flash_attn_func
    window = (-1, -1) if case.window is None else (case.window, 0)
    words = {"causal": case.causal, "window_size": window, "deterministic": case.deterministic}
    return {"FlashAttention-3": lambda q, k, v: _first(function(q, k, v, **words))}


def flash_attention_4(case: Case) -> dict[str, Attend]:
    """From its own package; at most by one entry."""
    if not installed("flash_attn.cute"):
        return {}
    package = import_module("flash_attn.cute")
    words = {"causal": case.causal, "deterministic": case.deterministic}
    if not case.documents:
        window = (None, None) if case.window is None else (case.window, 0)
        return {
            "FlashAttention-4": lambda q, k, v: _first(package.flash_attn_func(q, k, v, window_size=window, **words))
        }
    edges = torch.tensor([0, *case.documents]).cumsum(0).to("cuda", torch.int32)
    longest = max(case.documents)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = package.flash_attn_varlen_func(
            *(x[0] for x in (query, key, value)),
            cu_seqlens_q=edges, cu_seqlens_k=edges, max_seqlen_q=longest, max_seqlen_k=longest, **words,
        )  # fmt: skip
        return _first(out)[None]

    return {"FlashAttention-4": attend}


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def flash_attention_3_jax(case: Case) -> dict[str, Callable[[int], float]]:
    """By direction, the timer of FlashAttention-3's kernels where they are installed for JAX (head dimension 128).

    Calls are queued back to back and timed by the wall clock, so that what a call costs the host stays out.
    """
    plain = not (case.window or case.documents or case.deterministic) and case.head_dim == 128
    if not plain or installed("flash_attn_interface") or not installed("flash_attn3_jax"):
        return {}
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax = import_module("jax")
    flash = import_module("flash_attn3_jax.flash")
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    query, key, value, dout = (
        jax.random.normal(seed, (case.batch, case.length, n, case.head_dim), "bfloat16")
        for seed, n in zip(keys, heads, strict=True)
    )
    settings = (case.head_dim**-0.5, case.causal, (-1, -1))
    forward = functools.partial(jax.jit(lambda *x: flash._flash_mha_fwd(*x, *settings)), query, key, value)
    backward = functools.partial(
        jax.jit(lambda *x: flash._flash_mha_bwd(*x, *settings)), dout, query, key, value, *forward()
    )
    return {"fwd": _wall_clock(jax, forward), "bwd": _wall_clock(jax, backward)}


def _wall_clock(jax: ModuleType, function: Callable[[], object]) -> Callable[[int], float]:
    """Mean milliseconds of so many calls."""

    def milliseconds(calls: int) -> float:
        started, result = time.perf_counter(), None
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / calls * 1e3

    return milliseconds
