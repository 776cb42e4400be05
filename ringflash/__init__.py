"""Exact attention over sequences too long for one GPU.

Example:
    >>> import torch
    >>> from ringflash import DistributedFlashAttention, Mask, shard
    >>> attend = DistributedFlashAttention(Mask.causal())
    >>> x = shard(torch.randn(1, 4096, 8, 64), dim=1)
    >>> attend(x, x, x).shape
    torch.Size([1, 4096, 8, 64])
"""

from ringflash.attention import DistributedFlashAttention
from ringflash.batches import positions, shard, shard_batch, unshard
from ringflash.errors import ArgumentError, RankMismatchError, RingflashError, UnsupportedError
from ringflash.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.sharding import Sharding

__all__ = [
    "ArgumentError",
    "DistributedFlashAttention",
    "Mask",
    "Partition",
    "RankMismatchError",
    "RingflashError",
    "Sharding",
    "UnsupportedError",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "positions",
    "shard",
    "shard_batch",
    "unshard",
]
