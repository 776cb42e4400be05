"""`DistributedFlashAttention`: attention over a sequence whose tokens are dealt to the ranks of a group.

Legend: B sequences, S tokens of one sequence over all ranks, s tokens of it on this rank, H query heads, Hk key heads,
D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import ringflash.parallel.operators  # noqa: F401  registers torch.ops.ringflash
from ringflash.errors import ArgumentError
from ringflash.mask import Mask
from ringflash.parallel.mesh import Group, group_name, group_size
from ringflash.parallel.partition import NAMES, Partition


class DistributedFlashAttention(nn.Module):
    """Exact attention of this rank's tokens to the tokens of all ranks.

    Args:
        mask: which keys a query may see, over global positions.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is dealt. None is the default
            group if torch.distributed is initialised, and one device otherwise.
        partition: how tokens are dealt: "zigzag", "contiguous", "balanced" (for the mask), or a `Partition` of one
            sequence. Deal with `ringflash.shard` and the same partition.
        scale: factor of the scores before the softmax; 1 / sqrt(D) if None.
        kernel: "auto", or the name of one implementation (see `ringflash.kernels.select`).
        deterministic: gradients repeat bit for bit.

    Example:
        >>> attend = DistributedFlashAttention(Mask.causal() & Mask.sliding_window(1023))
        >>> query = torch.randn(1, 4096, 8, 64)
        >>> key = value = torch.randn(1, 4096, 2, 64)
        >>> attend(query, key, value).shape
        torch.Size([1, 4096, 8, 64])
    """

    def __init__(
        self,
        mask: Mask | None = None,
        group: Group = None,
        partition: str | Partition = "zigzag",
        scale: float | None = None,
        kernel: str = "auto",
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(partition, str) and partition not in NAMES:
            raise ArgumentError(f"partition={partition!r}; allowed are {', '.join(NAMES)} or a Partition")
        if group is not None and not isinstance(group, dist.ProcessGroup | DeviceMesh):
            raise ArgumentError(f"group={group!r}; allowed are a ProcessGroup, a one-dimensional DeviceMesh, or None")
        self.mask = Mask.causal() if mask is None else mask
        self.group = group
        self.partition = partition
        self.scale = scale
        self.kernel = kernel
        self.deterministic = deterministic

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        seqlen: int | None = None,
    ) -> Tensor:
        """Attention output for this rank's tokens.

        Args:
            query: (B, s, H, D), fp32, fp16 or bf16.
            key: (B, s, Hk, D), same dtype; H a multiple of Hk.
            value: (B, s, Hk, Dv), same dtype.
            cu_seqlens: global document boundaries over the B * S tokens laid end to end: (documents + 1,), on the host
                if there is more than one rank.
            seqlen: S; needed only where not every rank holds the same number of tokens.

        Returns:
            (B, s, H, Dv) in the query's dtype.

        Raises:
            ArgumentError: an argument is not supported; raised before any communication.
            RankMismatchError: ranks disagree on an argument.
        """
        return self.forward_with_lse(query, key, value, cu_seqlens, seqlen)[0]

    def forward_with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like `forward`; returns also the log-sum-exp of each row, (B, H, s) fp32."""
        query, key, value = _autocast(query, key, value)
        check_inputs(query, key, value)
        batch, tokens = query.shape[:2]
        ranks = group_size(self.group)
        seqlen = tokens * ranks if seqlen is None else seqlen
        boundaries = _boundaries(self.mask, cu_seqlens, batch * seqlen, ranks)
        out, lse = torch.ops.ringflash.attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            boundaries,
            None,
            None,
            None,
            None,
            self.mask.spec(),
            self.partition if isinstance(self.partition, str) else self.partition.spec(),
            group_name(self.group),
            batch,
            seqlen,
            seqlen,
            query.shape[-1] ** -0.5 if self.scale is None else self.scale,
            0.0,
            0.0,
            self.kernel,
            self.deterministic,
        )
        return out.unflatten(0, (batch, tokens)), lse.unflatten(1, (batch, tokens)).transpose(0, 1)

    def extra_repr(self) -> str:
        """What distinguishes this module."""
        return f"mask={self.mask}, ranks={group_size(self.group)}, partition={self.partition!r}, kernel={self.kernel!r}"


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ArgumentError unless query (B, s, H, D), key (B, s, Hk, D) and value (B, s, Hk, Dv) go together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; allowed is (batch, seqlen, heads, head_dim)")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ArgumentError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}; make them agree"
            )
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{name} is {tensor.dtype}; allowed are float32, float16 and bfloat16")
    if key.shape[:2] != query.shape[:2] or value.shape[:3] != key.shape[:3] or key.shape[3] != query.shape[3]:
        raise ArgumentError(
            f"shapes do not go together: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ArgumentError(f"query has {query.shape[2]} heads, key {key.shape[2]}; the first must be a multiple")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _boundaries(mask: Mask, cu_seqlens: Sequence[int] | Tensor | None, total: int, ranks: int) -> Tensor | None:
    """Global document boundaries as an int64 tensor, those of the mask included."""
    if cu_seqlens is None:
        return None if mask.boundaries is None else torch.tensor(_ending_at(total, mask.boundaries))
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu" and (ranks > 1 or mask.boundaries is not None):
            raise ArgumentError(
                f"cu_seqlens is on {cu_seqlens.device}; with {ranks} ranks it must be on the CPU, where plans are made"
            )
        if mask.boundaries is None:
            return cu_seqlens.to(torch.int64)
    given = mask & Mask.documents(_ending_at(total, [int(x) for x in cu_seqlens]))
    return torch.tensor(given.boundaries)


def _ending_at(total: int, boundaries: Sequence[int]) -> Sequence[int]:
    if boundaries[-1] != total:
        raise ArgumentError(f"cu_seqlens ends at {boundaries[-1]}; the batch has {total} tokens over all ranks")
    return boundaries
