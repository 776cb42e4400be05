"""Attention of this rank's tokens, in one of yunchang's layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import Options, rows_together, unpack
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.mesh import group_size
from ringflash.parallel.positions.partition import Partition
from ringflash.ring_flash_attn.arguments import attend, check_lengths
from ringflash.yunchang.extract_local import LAYOUTS, partition_of
from ringflash.yunchang.globals import sequence_ranks
from ringflash.yunchang.kernels import AttnType


class LongContextAttention(torch.nn.Module):
    """`flash_attn_func` over the ranks that `set_seq_parallel_pg` named.

    Args:
        scatter_idx: 2, the dimension of heads.
        gather_idx: 1, the dimension of tokens.
        ring_impl_type: layout of the tokens: "basic", "zigzag" or "strip".
        use_pack_qkv: changes nothing; keys travel together with values.
        use_sync: changes nothing; nothing is exchanged by all-to-all.
        attn_type: changes nothing; ringflash chooses its kernels.
        attn_processor: None.

    Example:
        >>> set_seq_parallel_pg(1, 1, rank=0, world_size=1)
        >>> x = torch.randn(1, 64, 4, 32)
        >>> LongContextAttention(ring_impl_type="zigzag")(x, x, x, causal=True).shape
        torch.Size([1, 64, 4, 32])
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_sync: bool = False,
        attn_type: AttnType = AttnType.FA,
        attn_processor: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check(ring_impl_type, (scatter_idx, gather_idx), (2, 1), attn_type)
        if attn_processor is not None:
            raise ArgumentError(f"attn_processor={attn_processor!r}; allowed is None")
        self.ring_impl_type = ring_impl_type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        """Attention of this rank's queries to the keys of all ranks.

        Args:
            query: (batch, s, nheads, headdim), as `EXTRACT_FUNC_DICT` gives them.
            key: (batch, sk, nheads_k, headdim); sk is s, except in the basic layout without causal and window_size.
            value: (batch, sk, nheads_k, headdim_v).
            dropout_p: see `ringflash.ring_flash_attn.ring_flash_attn_func`; so are those down to window_size.
            softmax_scale: see dropout_p.
            causal: see dropout_p.
            window_size: see dropout_p.
            softcap: scores become softcap * tanh(score / softcap); 0 for none.
            alibi_slopes: see dropout_p.
            deterministic: see dropout_p.
            return_attn_probs: changes nothing; out is all that is returned.

        Returns:
            out (batch, s, nheads, headdim_v).
        """
        group, layout = sequence_ranks.group, self.ring_impl_type
        try:
            numbers = dropout_p, softmax_scale, causal, window_size, softcap
            options = Options.of(*numbers, alibi_slopes, deterministic, False)
            q, k, v = (rows_together(name, x, 4) for name, x in (("query", query), ("key", key), ("value", value)))
            check_lengths(q, k, options, contiguous=layout == "basic")
            partition = _partition(layout, q.shape[1])
        except Exception as error:
            refuse(group, error)
            raise
        return attend(q, k, v, options, group, partition)[0]


class LongContextAttentionQKVPacked(torch.nn.Module):
    """`LongContextAttention` of queries, keys and values in one tensor.

    Args:
        scatter_idx: 3, the dimension of heads.
        gather_idx: 1, the dimension of tokens.
        ring_impl_type: see `LongContextAttention`; so are the others.
        use_sync: see ring_impl_type.
        attn_type: see ring_impl_type.
    """

    def __init__(
        self,
        scatter_idx: int = 3,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_sync: bool = False,
        attn_type: AttnType = AttnType.FA,
    ) -> None:
        super().__init__()
        _check(ring_impl_type, (scatter_idx, gather_idx), (3, 1), attn_type)
        self.attend = LongContextAttention(ring_impl_type=ring_impl_type)

    def forward(
        self,
        qkv: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        """`LongContextAttention.forward` of qkv (batch, s, 3, nheads, headdim)."""
        try:
            q, k, v = unpack("qkv", qkv, 3, 5)
        except Exception as error:
            refuse(sequence_ranks.group, error)
            raise
        rules = dropout_p, softmax_scale, causal, window_size, softcap
        return self.attend(q, k, v, *rules, alibi_slopes, deterministic, return_attn_probs)


def _partition(layout: str, tokens: int) -> str | Partition:
    """How sequences lie on the ranks that have so many tokens each."""
    ring, ulysses, ranks = sequence_ranks.ring, sequence_ranks.ulysses, group_size(sequence_ranks.group)
    if ring * ulysses != ranks:
        raise ArgumentError(
            f"{ranks} ranks, ring degree {ring}, ulysses degree {ulysses}: call set_seq_parallel_pg first"
        )
    if layout == "basic":
        return "contiguous"
    return partition_of(layout, tokens * ranks, ring, ulysses, sequence_ranks.ulysses_low)


def _check(ring_impl_type: str, dims: tuple[int, int], allowed: tuple[int, int], attn_type: AttnType) -> None:
    if ring_impl_type not in LAYOUTS:
        raise ArgumentError(f"ring_impl_type={ring_impl_type!r}; allowed are {', '.join(LAYOUTS)}")
    if dims != allowed:
        raise ArgumentError(f"scatter_idx and gather_idx are {dims}; allowed are {allowed}")
    if not isinstance(attn_type, AttnType):
        raise ArgumentError(f"attn_type={attn_type!r}; allowed are members of ringflash.yunchang.kernels.AttnType")
