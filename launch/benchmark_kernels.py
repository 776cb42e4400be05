"""Suite `kernels`: attention on one GPU, forward and backward, beside the peers that are installed.

32,768 tokens in all, as sequences of 2,048 to 32,768; bf16; 16 heads of 128, 32 of 64, 8 of 256. Backward is timed
alone, with the forward done before. FlexAttention is timed at 16,384 only, since it compiles for each shape.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from ringflash import Mask
from ringflash.errors import ArgumentError
from ringflash.functional import attention
from ringflash.kernels.select import select

if TYPE_CHECKING:
    from ringflash.launch.benchmark import Options, Row

HEADS = {128: 16, 64: 32, 256: 8}
TOTAL = 32768
LENGTHS = (2048, 8192, 16384, 32768)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key, value (B, S, H, D) to out (B, S, H, D)."""


def measure(options: Options) -> list[Row]:
    """Rows of every implementation at every shape."""
    lengths = [int(x) for x in options.tokens.split(",")] if options.tokens else LENGTHS
    rows = []
    for dim, heads in HEADS.items():
        for causal in (True, False):
            for length in lengths:
                rows += _rows(dim, heads, causal, length, options.repeats)
    for package, what in (("flash_attn_interface", "FlashAttention-3"), ("flash_attn.cute", "FlashAttention-4")):
        if not _installed(package):
            print(f"{what} is left out: its package {package} is not installed")
    return rows


def _rows(dim: int, heads: int, causal: bool, length: int, repeats: int) -> list[Row]:
    from ringflash.launch.benchmark import Row

    shape = (TOTAL // length, length, heads, dim)
    query, key, value, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    operations = 4 * TOTAL * length * heads * dim * (0.5 if causal else 1.0)
    case = f"D{dim} {'causal' if causal else 'full'} {heads} heads"
    rows = []
    for name, attend in _implementations(dim, causal, length).items():
        out = attend(*leaves)
        forward = _median(lambda attend=attend: attend(*leaves), repeats)
        backward = _median(lambda out=out: torch.autograd.grad(out, leaves, dout, retain_graph=True), repeats)
        for direction, milliseconds, cost in (("fwd", forward, 1.0), ("bwd", backward, 2.5)):
            tflops = operations * cost / milliseconds / 1e9
            rows.append(Row(name, case, length, direction, milliseconds, tflops))
            print(
                f"{name:20s} {case:22s} {length:6d} {direction} {milliseconds:8.3f} ms {tflops:5.0f} TFLOP/s",
                flush=True,
            )
    return rows


def _implementations(dim: int, causal: bool, length: int) -> dict[str, Attend]:
    found: dict[str, Attend] = {}
    for name in ("hopper", "triton"):
        try:
            select("cuda", torch.bfloat16, dim, kernel=name)
        except ArgumentError as error:
            print(f"ringflash {name} is left out: {error}")
            continue
        found[f"ringflash {name}"] = functools.partial(_ours, kernel=name, causal=causal)
    found["cuDNN"] = functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION, causal=causal)
    found["FlashAttention-2"] = functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION, causal=causal)
    if length == 16384 and dim <= 128:
        found["FlexAttention"] = _flex(causal, length)
    if _installed("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func as flash_attn_3

        found["FlashAttention-3"] = lambda q, k, v: _first(flash_attn_3(q, k, v, causal=causal))
    if _installed("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func as flash_attn_4

        found["FlashAttention-4"] = lambda q, k, v: _first(flash_attn_4(q, k, v, causal=causal))
    return found


def _ours(query: Tensor, key: Tensor, value: Tensor, kernel: str, causal: bool) -> Tensor:
    mask = Mask.causal() if causal else Mask.bidirectional()
    return attention(query, key, value, mask=mask, kernel=kernel)[0]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def _flex(causal: bool, length: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device="cuda")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)

    return attend


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a submodule is missing
        return False


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _median(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds over about `repeats` * 5 ms of running."""
    return do_bench(function, warmup=25, rep=repeats * 5, return_mode="median")
