"""`DistributedFlashAttention`: attention over a sequence whose tokens are sharded over the ranks of a group.

Legend: B sequences, S tokens of one sequence over all ranks, s tokens of it on this rank, H query heads, Hk key heads,
D head dimension, Dv the value's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from ringflash.functional import attention
from ringflash.parallel.mesh import ONE_DEVICE, Group, GroupLeftBehind, group_size, process_group
from ringflash.parallel.planning.generators import check_plan
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, check_name
from ringflash.parallel.sharding import Sharding


class GroupModule(nn.Module):
    """A module with the group over whose ranks it attends: a copy keeps the group, a file leaves it behind.

    Args:
        group: as in `DistributedFlashAttention`.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        process_group(group)  # raises for what is none
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> GroupModule:
        copied = memo[id(self)] = self.__new__(type(self))
        # Groups are processes' own, not the module's: a copy attends over the same one.
        copied.__dict__ = {name: x if name == "group" else copy.deepcopy(x, memo) for name, x in self.__dict__.items()}
        return copied

    def __getstate__(self) -> dict[str, object]:
        travels = self.group is None or self.group is ONE_DEVICE or isinstance(self.group, GroupLeftBehind)
        return self.__dict__ if travels else self.__dict__ | {"group": GroupLeftBehind(group_size(self.group))}


class DistributedFlashAttention(GroupModule):
    """Exact attention of this rank's tokens to the tokens of all ranks.

    Args:
        mask: which keys a query may see, over global positions; causal if None, or the only mask of a sharding.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded. None is the
            default group if torch.distributed is initialised, and one device otherwise.
        partition: how tokens are sharded: "zigzag", "contiguous", "balanced" (for the mask), or a `Partition` of one
            sequence. Shard with `ringflash.shard` and the same partition, or make a `ringflash.Sharding` and pass it.
        scale: factor of the scores before the softmax; 1 / sqrt(D) if None.
        kernel: "auto", or the name of one implementation (see `ringflash.kernels.select`).
        deterministic: gradients repeat bit for bit.
        softcap: scores become softcap * tanh(score / softcap); 0 or None for none.
        dropout: probability of dropping a pair while training; see `ringflash.functional.attention` for its seed.
        head_ranks: how many ranks that follow each other exchange heads for tokens; see `ringflash.Sharding`. H is a
            multiple of it. A sharding that is passed has its own.
        plan: how keys travel between ranks; see `ringflash.Sharding`, which chooses if None. Likewise.

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
        softcap: float | None = 0.0,
        dropout: float | None = 0.0,
        head_ranks: int | None = None,
        plan: str | None = None,
    ) -> None:
        super().__init__(group)
        check_name(partition)
        self.mask = Mask.causal() if mask is None else mask
        self._names_its_mask = mask is not None
        self.partition = partition
        self.scale = scale
        self.kernel = kernel
        self.deterministic = deterministic
        self.softcap = softcap
        self.dropout = dropout
        self.head_ranks = head_ranks
        if plan is not None:
            check_plan(plan)
        self.plan = plan

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        seqlen: int | None = None,
        alibi_slopes: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        sinks: Tensor | None = None,
        query_cu_seqlens: Sequence[int] | Tensor | None = None,
        key_seqlen: int | None = None,
        sharding: Sharding | None = None,
    ) -> Tensor:
        """Attention output for this rank's tokens.

        Args:
            query: (B, s, H, D), fp32, fp16 or bf16.
            key: (B, s, Hk, D), same dtype; H a multiple of Hk.
            value: (B, s, Hk, Dv), same dtype.
            cu_seqlens: global document boundaries over the B * S tokens laid end to end: (documents + 1,), on the host
                if there is more than one rank.
            seqlen: S; needed only where not every rank holds the same number of tokens.
            alibi_slopes: fp32 (H,), or (B, H), or (documents, H) with cu_seqlens.
            key_padding_mask: (B, s) bool, False for this rank's keys that nobody may see.
            sinks: (H,) learned logits that join each row's softmax without a value, as in gpt-oss.
            query_cu_seqlens: boundaries of the queries, where they differ from those of the keys.
            key_seqlen: Sk, tokens of keys over all ranks; needed only where they are not sharded as the queries are,
                and not every rank holds the same number.
            sharding: how the batch lies on its ranks, in place of lengths, documents and partition.

        Returns:
            (B, s, H, Dv) in the query's dtype.

        Raises:
            ArgumentError: an argument is not supported; raised before any communication.
            RankMismatchError: ranks disagree on an argument.
        """
        return self.forward_with_lse(
            query,
            key,
            value,
            cu_seqlens,
            seqlen,
            alibi_slopes,
            key_padding_mask,
            sinks,
            query_cu_seqlens,
            key_seqlen,
            sharding,
        )[0]

    def forward_with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        seqlen: int | None = None,
        alibi_slopes: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        sinks: Tensor | None = None,
        query_cu_seqlens: Sequence[int] | Tensor | None = None,
        key_seqlen: int | None = None,
        sharding: Sharding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like `forward`; returns also the log-sum-exp of each row, (B, H, s) fp32."""
        return attention(
            query,
            key,
            value,
            mask=self.mask if sharding is None or self._names_its_mask else None,
            cu_seqlens=cu_seqlens,
            query_cu_seqlens=query_cu_seqlens,
            seqlen=seqlen,
            key_seqlen=key_seqlen,
            group=self.group,
            partition=self.partition if sharding is None else None,
            head_ranks=self.head_ranks if sharding is None else None,
            plan=self.plan if sharding is None else None,
            sharding=sharding,
            scale=self.scale,
            softcap=self.softcap,
            alibi_slopes=alibi_slopes,
            dropout=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            sinks=sinks,
            kernel=self.kernel,
            deterministic=self.deterministic,
        )

    def extra_repr(self) -> str:
        """What distinguishes this module."""
        return f"mask={self.mask}, ranks={group_size(self.group)}, partition={self.partition!r}, kernel={self.kernel!r}"
