"""Suite `ring`: causal attention over the GPUs of one host, beside torch's context parallelism and Ulysses.

Run under torchrun. 32 query and 8 key heads, head dimension 128, bf16, one sequence. "2 x 2" is two ranks that exchange
heads in a ring of two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringflash import DistributedFlashAttention
from ringflash.launch.benchmark_report import Report, Row, table_of_speeds

if TYPE_CHECKING:
    from ringflash.launch.benchmark import Options

HEADS, KEY_HEADS, DIM = 32, 8, 128
TOKENS = (32768, 131072, 524288)
REPEATS = 20

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(options: Options) -> Iterator[Report]:
    """Rows on rank 0 after every length, nothing elsewhere."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rows, repeats = [], options.repeats or REPEATS
    for tokens in options.tokens or TOKENS:
        rows += _ours(tokens, repeats) + _ulysses(tokens, repeats)
        rows += _context_parallel(tokens, repeats, "allgather")
        rows += _context_parallel(tokens, repeats, "alltoall")
        if dist.get_rank() == 0:
            yield Report(rows, table_of_speeds(rows))
    dist.destroy_process_group()


def ways(ranks: int) -> dict[str, tuple[str, int]]:
    """Partition and `head_ranks` of what is timed of ringflash: rings, heads alone, and heads within a ring."""
    found = {"zigzag": ("zigzag", 1), "contiguous": ("contiguous", 1), "Ulysses": ("contiguous", ranks)}
    return found | {f"{n} x {ranks // n}": ("zigzag", n) for n in range(2, ranks) if ranks % n == 0}


def _ours(tokens: int, repeats: int) -> list[Row]:
    rows = []
    for name, (partition, head_ranks) in ways(dist.get_world_size()).items():
        attend = DistributedFlashAttention(partition=partition, head_ranks=head_ranks)
        rows += _both(f"ringflash {name}", attend, _shares(tokens, sequence_dim=1), tokens, repeats)
    return rows


class _HeadsForTokens(torch.autograd.Function):
    """(s, H, D) of all heads to (S, H / P, D) of all tokens, or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_heads: bool) -> Tensor:
        ctx.scatter_heads = scatter_heads
        return _exchange(x, scatter_heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]  # torch's `*grads`
        return _exchange(gradient, not ctx.scatter_heads), None


def _exchange(x: Tensor, scatter_heads: bool) -> Tensor:
    ranks = dist.get_world_size()
    if scatter_heads:
        parts = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return received.flatten(0, 1)
    parts = x.contiguous().unflatten(0, (ranks, -1))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received.transpose(0, 1).flatten(1, 2)


def _ulysses(tokens: int, repeats: int) -> list[Row]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (_HeadsForTokens.apply(x[0], True).transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return _HeadsForTokens.apply(out[0].transpose(0, 1), False)[None]

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _both("Ulysses cuDNN", attend, _shares(tokens, sequence_dim=1), tokens, repeats)


def _context_parallel(tokens: int, repeats: int, rotate: str) -> list[Row]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("sequence",))
    set_rotate_method(rotate)
    whole = [
        torch.randn(1, heads, tokens, DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * len(whole)),
    ):
        shares = [x.clone().requires_grad_() for x in whole[:3]] + [whole[3].clone()]
        return _both(f"torch {rotate}", attend, shares, tokens, repeats)


def _shares(tokens: int, sequence_dim: int) -> list[Tensor]:
    """This rank's query, key, value and gradient of out."""
    shares = []
    for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS):
        shape = [1, heads, DIM]
        shape.insert(sequence_dim, tokens // dist.get_world_size())
        shares.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=len(shares) < 3))
    return shares


def _both(name: str, attend: Attend, shares: list[Tensor], tokens: int, repeats: int) -> list[Row]:
    *leaves, dout = shares

    def forward() -> None:
        with torch.no_grad():
            attend(*leaves)

    def forward_backward() -> None:
        torch.autograd.grad(attend(*leaves), leaves, dout)

    rows = []
    for direction, function, cost in (("fwd", forward, 1.0), ("fwd+bwd", forward_backward, 3.5)):
        operations = 4 * HEADS * tokens**2 * DIM * 0.5 * cost / dist.get_world_size()
        milliseconds = _median(function, repeats)
        rows.append(
            Row(name, "causal 32/8 heads D128", tokens, direction, milliseconds, operations / milliseconds / 1e9)
        )
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)
    return rows


def _median(function: Callable[[], None], repeats: int) -> float:
    """Median time of the slowest rank."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.median().item()
