"""Runs one attention problem on the ranks of a pool and puts the shares together again.

Shares are cut and joined here by the partition's own segments, not by `ringflash.shard`, so that a mistake there
cannot hide one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from cases import RESULTS, Shape, assert_as_exact_as_torch, inputs, visible_in_batch
from torch import Tensor

from ringflash import DistributedFlashAttention
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, resolve


@dataclass(frozen=True)
class Problem:
    """One attention problem with all of its arguments, small enough to send to every rank."""

    mask: Mask
    shape: Shape = field(default_factory=Shape)
    partition: str | Partition = "zigzag"
    dtype: torch.dtype = torch.float32
    cu_seqlens: tuple[int, ...] | None = None
    scale: float | None = None
    deterministic: bool = False
    kernel: str = "auto"
    seed: int = 0
    head_ranks: int | None = 1

    @property
    def whole_mask(self) -> Mask:
        """The mask with the documents of `cu_seqlens`."""
        return self.mask if self.cu_seqlens is None else self.mask & Mask.documents(self.cu_seqlens)

    @property
    def seen(self) -> Tensor:
        """Dense (B * S, B * S) visibility."""
        return visible_in_batch(self.whole_mask, self.shape.batch, self.shape.length)

    def inputs(self) -> tuple[Tensor, ...]:
        """Global q, k, v and the gradient of out."""
        return inputs(self.shape, self.dtype, self.seed)

    def rows(self, rank: int, ranks: int) -> Tensor:
        """Positions within each sequence that a rank holds."""
        segments = resolve(self.partition, self.shape.length, ranks, self.whole_mask).segments[rank]
        return torch.tensor([p for start, stop in segments for p in range(start, stop)], dtype=torch.int64)


def attend_share(problem: Problem, group: object = None, device: str = "cpu") -> dict[str, Tensor]:
    """This rank's out, lse and gradients; the body that every rank runs."""
    rank, ranks = place_in(group)
    module = DistributedFlashAttention(
        problem.mask,
        group,
        problem.partition,
        problem.scale,
        problem.kernel,
        problem.deterministic,
        head_ranks=problem.head_ranks,
    )
    rows = problem.rows(rank, ranks)
    *leaves, dout = (x[:, rows].to(device) for x in problem.inputs())
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = module.forward_with_lse(*leaves, cu_seqlens=problem.cu_seqlens, seqlen=problem.shape.length)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    assert out.shape == (*leaves[0].shape[:3], leaves[2].shape[3])
    results = zip((*RESULTS, "lse"), (out.detach(), *gradients, lse.detach().transpose(1, 2)), strict=True)
    return {name: x.cpu() for name, x in results}


def place_in(group: object) -> tuple[int, int]:
    """This rank's number in a group (or DeviceMesh, or the default group), and the group's size."""
    if hasattr(group, "get_group"):
        group = group.get_group()
    return dist.get_rank(group), dist.get_world_size(group)


def joined(problem: Problem, shares: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from the shares of all ranks, by global position."""
    whole = {}
    for name in shares[0]:
        size = (problem.shape.batch, problem.shape.length, *shares[0][name].shape[2:])
        whole[name] = torch.full(size, torch.nan, dtype=shares[0][name].dtype)
        for rank, share in enumerate(shares):
            whole[name][:, problem.rows(rank, len(shares))] = share[name]
    return whole


def solve(pool, ranks: int, problem: Problem) -> dict[str, Tensor]:
    """Out, lse and gradients of a problem sharded to `ranks` gloo ranks."""
    return joined(problem, pool(ranks).run(attend_share, problem))


def assert_ring_is_exact(pool, ranks: int, problem: Problem) -> None:
    """`ranks` ranks compute what the definition says, as exactly as torch's own attention on one device."""
    assert_as_exact_as_torch(solve(pool, ranks, problem), problem.inputs(), problem.seen, problem.scale)


def one_device(problem: Problem, device: str = "cpu") -> dict[str, Tensor]:
    """The same by the module without a process group."""
    assert not dist.is_initialized()
    module = DistributedFlashAttention(
        problem.mask, None, problem.partition, problem.scale, problem.kernel, problem.deterministic
    )
    *leaves, dout = (x.to(device) for x in problem.inputs())
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = module.forward_with_lse(*leaves, cu_seqlens=problem.cu_seqlens)
    gradients = torch.autograd.grad(out, leaves, dout)
    results = zip((*RESULTS, "lse"), (out.detach(), *gradients, lse.detach().transpose(1, 2)), strict=True)
    return {name: x.cpu() for name, x in results}


class Layer(torch.nn.Module):
    """Projections around the attention, so that weights have gradients."""

    def __init__(self, group, heads=4, key_heads=2, head_dim=16):
        super().__init__()
        self.sizes = (heads, key_heads, key_heads)
        generator = torch.Generator().manual_seed(5)
        self.project = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(32, n * head_dim, generator=generator) * 32**-0.5) for n in self.sizes
        )
        self.attend = DistributedFlashAttention(Mask.causal(), group)

    def forward(self, x, seqlen):
        q, k, v = ((x @ w).unflatten(-1, (n, -1)) for w, n in zip(self.project, self.sizes, strict=True))
        return self.attend(q, k, v, seqlen=seqlen)
