"""Exact attention over sequences too long for one GPU.

Example:
    >>> import torch
    >>> from ringflash import DistributedFlashAttention, Mask, shard
    >>> attend = DistributedFlashAttention(Mask.causal())
    >>> x = shard(torch.randn(1, 4096, 8, 64), dim=1)
    >>> attend(x, x, x).shape
    torch.Size([1, 4096, 8, 64])
"""

from pathlib import Path as _Path

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    # In a checkout the sibling folders are this package's subpackages; an installed wheel holds them inside.
    __path__.append(str(_checkout))

from ringflash.attention import DistributedFlashAttention  # noqa: E402
from ringflash.errors import ArgumentError, RankMismatchError, RingflashError, UnsupportedError  # noqa: E402
from ringflash.flash_attn import (  # noqa: E402
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ringflash.kvcache import flash_attn_with_kvcache  # noqa: E402
from ringflash.mask import Mask  # noqa: E402
from ringflash.parallel.partition import Partition  # noqa: E402
from ringflash.ring_flash_attn import (  # noqa: E402
    ring_flash_attn_func,
    ring_flash_attn_qkvpacked_func,
    ring_flash_attn_varlen_func,
    ring_flash_attn_varlen_qkvpacked_func,
)
from ringflash.sharding import positions, shard, shard_batch, unshard  # noqa: E402

__all__ = [
    "ArgumentError",
    "DistributedFlashAttention",
    "Mask",
    "Partition",
    "RankMismatchError",
    "RingflashError",
    "UnsupportedError",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "positions",
    "ring_flash_attn_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "shard",
    "shard_batch",
    "unshard",
]
