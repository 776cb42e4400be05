"""SageMaker's attention modules, `torch.sagemaker.nn.attn`.

    attend = FlashSelfAttention()
    out = attend((q, k, v), causal=True, cast_dtype=torch.bfloat16, layout="b h s d")

Two arguments are not SageMaker's. With `group`, tokens are sharded over its ranks, as `ringflash.shard` gives them or
as the `sharding` of a call says. Without it a module attends to what it is given, whatever groups there are.

Legend: b sequences, s tokens of one sequence on this rank, h heads, d head dimension, in the order that `layout` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ringflash.attention import GroupModule
from ringflash.errors import ArgumentError
from ringflash.functional import attention, check_sharding
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import ONE_DEVICE, Group, group_size
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.sharding import Sharding
from ringflash.sagemaker.masks import alibi, visible_keys

Packed = Tensor | Sequence[Tensor]
"""Several tensors; or one that holds them side by side in the heads, or in a dimension in front of the heads."""

CAUSAL, BIDIRECTIONAL = Mask.causal(), Mask.bidirectional()


class _FlashAttention(GroupModule):
    """What both modules share."""

    use_alibi = False

    def __init__(self, attention_dropout_prob: float, scale: float | None, group: Group) -> None:
        super().__init__(group)
        if not 0 <= attention_dropout_prob < 1:
            raise ArgumentError(f"attention_dropout_prob={attention_dropout_prob}; allowed is from 0 to below 1")
        self.attention_dropout_prob = attention_dropout_prob
        self.scale = scale

    def _attend(
        self,
        packed: Sequence[tuple[str, Packed, int]],
        attn_mask: Tensor | None,
        causal: bool,
        cast_dtype: torch.dtype | None,
        layout: str,
        sharding: Sharding | None,
    ) -> Tensor:
        """Attention; `packed` holds for each argument its name, what was given, and how many tensors it stands for."""
        check_sharding(sharding)
        try:
            axes = _axes(layout)
            if not isinstance(causal, bool):
                raise ArgumentError(f"causal={causal!r}; allowed are True and False")
            if not isinstance(cast_dtype, torch.dtype | None):
                raise ArgumentError(
                    f"cast_dtype={cast_dtype!r}; allowed are a torch.dtype, as torch.bfloat16, and None"
                )
            unpacked = [x for name, given, count in packed for x in _unpack(name, given, count, axes)]
            query, key, value = (x if cast_dtype is None else x.to(cast_dtype) for x in unpacked)
            slopes, visible = self._read(attn_mask, query, key, causal, sharding)
        except Exception as error:
            refuse(self.group if sharding is None else sharding.peers(self.group), error)
            raise
        out, _ = attention(
            query,
            key,
            value,
            mask=CAUSAL if causal else BIDIRECTIONAL,
            group=self.group,
            sharding=sharding,
            scale=self.scale,
            alibi_slopes=slopes,
            dropout=self.attention_dropout_prob if self.training else 0.0,
            key_padding_mask=visible,
        )
        return rearrange(out, f"b s h d -> {' '.join(axes)}")

    def _read(
        self, attn_mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, sharding: Sharding | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """ALiBi's slopes, and which keys may be seen."""
        batch, queries, heads, _ = query.shape
        if not self.use_alibi:
            return None, visible_keys(attn_mask, batch, queries, key.shape[1], causal)
        ranks = group_size(self.group) if sharding is None else sharding.ranks
        if not causal or ranks > 1:
            raise ArgumentError(
                f"use_alibi=True with causal={causal} on {ranks} ranks; allowed is causal=True on one rank. "
                "ringflash.DistributedFlashAttention takes ALiBi's slopes with every mask and on any number of ranks"
            )
        return alibi(attn_mask, batch, heads, key.shape[1])

    def extra_repr(self) -> str:
        """What distinguishes this module."""
        return (
            f"attention_dropout_prob={self.attention_dropout_prob}, scale={self.scale}, ranks={group_size(self.group)}"
        )


class FlashSelfAttention(_FlashAttention):
    """`torch.sagemaker.nn.attn.FlashSelfAttention`.

    Args:
        attention_dropout_prob: probability of dropping a pair while training.
        scale: factor of the scores before the softmax; 1 / sqrt(d) if None.
        triton_flash_attention: what SageMaker asks for before it takes a mask. The kernel is this machine's fastest
            either way, and masks are always taken.
        use_alibi: the call's mask holds biases of ALiBi; together with `triton_flash_attention`.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded; None is the
            default group. Without the argument a module attends on its own device, as SageMaker's does.

    Example:
        >>> q = k = v = torch.randn(2, 8, 1024, 64)
        >>> FlashSelfAttention()((q, k, v), causal=True, cast_dtype=torch.bfloat16, layout="b h s d").dtype
        torch.bfloat16
    """

    def __init__(
        self,
        attention_dropout_prob: float = 0.0,
        scale: float | None = None,
        triton_flash_attention: bool = False,
        use_alibi: bool = False,
        *,
        group: Group = ONE_DEVICE,
    ) -> None:
        super().__init__(attention_dropout_prob, scale, group)
        if use_alibi and not triton_flash_attention:
            raise ArgumentError("use_alibi=True with triton_flash_attention=False; SageMaker has ALiBi with both only")
        self.triton_flash_attention = triton_flash_attention
        self.use_alibi = use_alibi

    def forward(
        self,
        qkv: Packed,
        attn_mask: Tensor | None = None,
        causal: bool = False,
        cast_dtype: torch.dtype | None = None,
        layout: str = "b h s d",
        *,
        sharding: Sharding | None = None,
    ) -> Tensor:
        """Attention output for this rank's tokens.

        Args:
            qkv: query, key and value, each in the layout. Or one tensor of all three: with 3 * h heads, the queries'
                first, or with another dimension of 3 in front of the heads.
            attn_mask: keys that nobody may see, as (b, s) bool or integers, 0 for those; or as (b, 1, 1, s) or
                (b, 1, s, s), bool, False for those, or floats to add, -10,000 or less for those. With `use_alibi`
                (b, h, 1, s) fp32, biases to add. A query that sees no key gives 0.
            causal: a query sees no key behind it; where queries are fewer than keys, the last stands at the last key.
            cast_dtype: what the tensors are cast to before; the result keeps it.
            layout: order of dimensions, any of b, h, s and d.
            sharding: how the batch lies on its ranks: their shares, documents and lengths.

        Returns:
            (b, h, s, d) in the order of `layout`.

        Raises:
            ArgumentError: an argument is not supported; raised before any communication.
            RankMismatchError: ranks disagree on an argument.
        """
        return self._attend([("qkv", qkv, 3)], attn_mask, causal, cast_dtype, layout, sharding)


class FlashGroupedQueryAttention(_FlashAttention):
    """`torch.sagemaker.nn.attn.FlashGroupedQueryAttention`.

    Args:
        attention_dropout_prob: see `FlashSelfAttention`.
        scale: see `FlashSelfAttention`.
        group: see `FlashSelfAttention`.

    Example:
        >>> q, k, v = (torch.randn(2, heads, 1024, 64) for heads in (8, 2, 2))
        >>> FlashGroupedQueryAttention()(q, (k, v), causal=True, layout="b h s d").shape
        torch.Size([2, 8, 1024, 64])
    """

    def __init__(
        self, attention_dropout_prob: float = 0.0, scale: float | None = None, *, group: Group = ONE_DEVICE
    ) -> None:
        super().__init__(attention_dropout_prob, scale, group)

    def forward(
        self,
        q: Tensor,
        kv: Packed,
        causal: bool = False,
        cast_dtype: torch.dtype | None = None,
        *,
        layout: str,
        attn_mask: Tensor | None = None,
        sharding: Sharding | None = None,
    ) -> Tensor:
        """Attention output for this rank's tokens.

        Args:
            q: the query, in the layout; its heads a multiple of the key's.
            kv: key and value, each in the layout. Or one tensor of both: with 2 * h heads, the keys' first, or with
                another dimension of 2 in front of the heads.
            causal: see `FlashSelfAttention.forward`; so are the others.
            cast_dtype: see causal.
            layout: see causal. It has to be said: SageMaker's reference gives two defaults, and tensors in the other
                order would mean something else without an error.
            attn_mask: see causal.
            sharding: see causal.

        Returns:
            (b, h, s, d) in the order of `layout`.

        Raises:
            ArgumentError: an argument is not supported; raised before any communication.
            RankMismatchError: ranks disagree on an argument.
        """
        return self._attend([("q", q, 1), ("kv", kv, 2)], attn_mask, causal, cast_dtype, layout, sharding)


def _axes(layout: str) -> list[str]:
    axes = layout.split() if isinstance(layout, str) else []
    if sorted(axes) != ["b", "d", "h", "s"]:
        raise ArgumentError(f"layout={layout!r}; allowed are b, h, s and d in any order, as 'b h s d'")
    return axes


def _unpack(name: str, given: Packed, count: int, axes: list[str]) -> list[Tensor]:
    """`count` tensors (b, s, h, d)."""
    if isinstance(given, tuple | list) and count > 1:
        if len(given) != count:
            raise ArgumentError(f"{name} has {len(given)} tensors; allowed are {count}, or one of all")
        return [x for number, one in enumerate(given) for x in _unpack(f"{name}[{number}]", one, 1, axes)]
    if not isinstance(given, Tensor):
        raise ArgumentError(f"{name} is a {type(given).__name__}; allowed are tensors")
    heads = axes.index("h")
    if given.dim() == 4 and given.shape[heads] % count == 0:
        together = "(n h)"
    elif given.dim() == 5 and count > 1 and given.shape[heads] == count:
        together = "n h"
    else:
        more = f" with {count} * h heads, or with a dimension of {count} in front of the heads" if count > 1 else ""
        raise ArgumentError(f"{name} has shape {tuple(given.shape)}; allowed is ({', '.join(axes)}){more}")
    pattern = " ".join(together if axis == "h" else axis for axis in axes)
    found = rearrange(given, f"{pattern} -> n b s h d", n=count).unbind(0)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in found]
