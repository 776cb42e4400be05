"""flash-attn's rotary embedding (Su et al., arXiv 2104.09864) in torch operators, on any device.

    from ringflash.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
    q = apply_rotary_emb(q, cos, sin)                       # cos and sin of the angles, (seqlen_ro, rotary_dim / 2)
    q, kv = RotaryEmbedding(headdim)(q, kv)                 # in place

Arguments that the functions share:

    cos, sin            (seqlen_ro, rotary_dim / 2) in x's dtype or fp32, rotary_dim at most headdim. Dimensions behind
                        rotary_dim stay as they are.
    interleaved         dimensions 0 and 1, 2 and 3 ... are turned together, instead of 0 and rotary_dim / 2,
                        1 and rotary_dim / 2 + 1 ...
    seqlen_offsets      row of cos and sin at which each sequence begins: one number, or (batch,) int on x's device.
                        Rows beyond seqlen_ro are refused where the host knows them, as a number or on the CPU; on a
                        GPU, which is not waited for, tokens there stay as they are.

Sums are made in fp32 (float64 for float64) and rounded once. Gradients are those of torch's operators. What works in
place follows torch's rules: a leaf that requires a gradient is refused. What flash-attn does not take and this does:
any head dimension, fp32 and float64, tables in fp32 for tensors of 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import Longest, longest_needed
from ringflash.flash_attn.layers.angles import batch_angles, check_tables, packed_angles
from ringflash.functional import check_types
from ringflash.kernels.rotary import rotate
from ringflash.parallel.positions.integers import check_flag


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: Longest = None,
) -> Tensor:
    """Turn the first dimensions of x; arguments not listed are the module's.

    Args:
        x: (batch, seqlen, nheads, headdim), or packed (total, nheads, headdim) with `cu_seqlens`.
        cos: as in the module.
        sin: as in the module.
        interleaved: as in the module.
        inplace: write to x, and return it.
        seqlen_offsets: as in the module.
        cu_seqlens: (batch + 1,) int, where sequences begin and end in `total`. Tokens behind the last stay as they are.
        max_seqlen: at least the longest sequence of `cu_seqlens`; comes with it.

    Returns:
        x's shape and dtype.

    Raises:
        ArgumentError: an argument is not supported.

    Example:
        >>> x, angles = torch.ones(1, 3, 2, 4), torch.arange(3.0)[:, None] * torch.tensor([1.0, 0.01])
        >>> apply_rotary_emb(x, angles.cos(), angles.sin()).shape
        torch.Size([1, 3, 2, 4])
    """
    check_tables(x, cos, sin)
    check_flag("interleaved", interleaved)
    check_flag("inplace", inplace)
    if cu_seqlens is None:
        angles = batch_angles(x, cos, sin, seqlen_offsets)
    else:
        angles = packed_angles(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if not inplace:
        return rotate(x, *angles, interleaved)
    _refuse_leaf("x", x)
    rotating = x[..., : 2 * cos.shape[1]]
    rotating.copy_(rotate(rotating, *angles, interleaved))
    return x


apply_rotary_emb_func = apply_rotary_emb
"""The name by which older code imports it."""


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn queries and keys in place, and leave values; arguments not listed are the module's.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, nheads + 2 * nheads_k, headdim).
        cos: as in the module.
        sin: as in the module.
        cos_k: of the keys, if others.
        sin_k: of the keys, if others.
        interleaved: as in the module.
        seqlen_offsets: as in the module.
        num_heads_q: nheads, where qkv has four dimensions.

    Returns:
        qkv.
    """
    _refuse_leaf("qkv", qkv)
    check_types({"cos": cos, "sin": sin}, {"cos_k": cos_k, "sin_k": sin_k})
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif (
        qkv.dim() == 4
        and isinstance(num_heads_q, int)
        and 0 < num_heads_q < qkv.shape[2]
        and not ((qkv.shape[2] - num_heads_q) % 2)
    ):
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (qkv.shape[2] + num_heads_q) // 2]
    else:
        raise ArgumentError(
            f"qkv has shape {tuple(qkv.shape)} and num_heads_q={num_heads_q}; allowed is (batch, seqlen, 3, nheads, "
            "headdim), or (batch, seqlen, num_heads_q + 2 * nheads_k, headdim)"
        )
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turn keys in place, and leave values; arguments not listed are the module's.

    Args:
        kv: (batch, seqlen, 2, nheads_k, headdim).
        cos: as in the module.
        sin: as in the module.
        interleaved: as in the module.
        seqlen_offsets: as in the module.

    Returns:
        kv.
    """
    _refuse_leaf("kv", kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ArgumentError(f"kv has shape {tuple(kv.shape)}; allowed is (batch, seqlen, 2, nheads_k, headdim)")
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Turns queries and keys in place, by angles that it keeps for as many positions as were needed so far.

    The angle of pair j at position p is p * base ** (-2 * j / dim). It is computed in float64 of frequencies in fp32,
    whatever the module was cast to.

    With `scale_base` it is xPos (Sun et al., arXiv 2212.10554): queries are scaled by s ** ((p - middle) / scale_base)
    and keys by its inverse, with s = (2 * j + 0.4 * dim) / (1.4 * dim) and the middle of the positions that are kept.
    So a key that was turned in one call goes only with queries that were turned by the same tables: pass `max_seqlen`.

    Args:
        dim: rotary_dim, even; head dimensions behind it stay as they are.
        base: of the frequencies.
        interleaved: as in the module's functions.
        scale_base: of xPos; None for the plain embedding.
        device: of the frequencies.
        pos_idx_in_fp32: False computes angles in the frequencies' dtype, as flash-attn before 2.8 did if told to:
            for models that were trained so.

    Example:
        >>> rotary = RotaryEmbedding(64)
        >>> rotary(torch.randn(1, 10, 3, 4, 64)).shape
        torch.Size([1, 10, 3, 4, 64])
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ArgumentError(f"dim={dim}; allowed are positive even numbers")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        # flash-attn's names: models that decode with a cache read the tables, which are None before the first call.
        self._seq_len_cached = 0
        self._cos_cached: Any = None
        self._sin_cached: Any = None
        self._cos_k_cached: Any = None
        self._sin_k_cached: Any = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: Longest = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn in place.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * nheads_k, headdim); with `kv`
                the queries (batch, seqlen, nheads, headdim).
            kv: (batch, seqlen, 2, nheads_k, headdim), or None.
            seqlen_offset: position of each sequence's first token: one number, or (batch,) int.
            max_seqlen: positions to have angles for; needed if `seqlen_offset` is a tensor.
            num_heads_q: where qkv has four dimensions and is not the queries alone.

        Returns:
            qkv, or with `kv` the pair (qkv, kv).
        """
        check_types({"qkv": qkv}, {"kv": kv})
        if qkv.dim() not in ((4, 5) if kv is None else (4,)):
            allowed = "(batch, seqlen, 3, nheads, headdim), or four dimensions with num_heads_q or kv"
            raise ArgumentError(f"qkv has shape {tuple(qkv.shape)}; allowed is {allowed}")
        if max_seqlen is not None:
            positions = longest_needed("max_seqlen", max_seqlen, "RotaryEmbedding")
            self._update_cos_sin_cache(positions, device=qkv.device, dtype=qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        elif self._cos_cached is None:
            raise ArgumentError("max_seqlen is None and seqlen_offset a tensor; pass how many positions there are")
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = (cos, sin) if self.scale_base is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (even + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Have tables for `seqlen` positions."""
        kept = self._cos_cached
        if (
            kept is not None
            and seqlen <= self._seq_len_cached
            and kept.device == device
            and kept.dtype == dtype
            and (torch.is_inference_mode_enabled() or not kept.is_inference())  # autograd cannot keep the others
        ):
            return
        self._seq_len_cached = seqlen
        frequencies = self.inv_freq
        if self.pos_idx_in_fp32:
            # A module that was cast with its model has rounded frequencies.
            frequencies = frequencies if frequencies.dtype == torch.float32 else self._compute_inv_freq(device)
            frequencies = frequencies.to(device, torch.float64)
        position = torch.arange(seqlen, device=device, dtype=frequencies.dtype)
        angles = torch.outer(position, frequencies.to(device))
        cos, sin = angles.cos(), angles.sin()
        scale = self.scale
        if scale is not None and self.scale_base is not None:
            scale = scale if scale.dtype == torch.float32 else self._compute_scale(device)
            power = (torch.arange(seqlen, device=device, dtype=torch.float64) - seqlen // 2) / self.scale_base
            scale = scale.to(device, torch.float64) ** power[:, None]
            self._cos_k_cached, self._sin_k_cached = ((x / scale).to(dtype) for x in (cos, sin))
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)


def _refuse_leaf(name: str, x: Tensor) -> None:
    """Autograd would not know of a change to a leaf that requires a gradient."""
    check_types({name: x})
    if torch.is_grad_enabled() and x.is_leaf and x.requires_grad:
        raise ArgumentError(
            f"{name} is a leaf that requires a gradient and would be changed in place; pass inplace=False, or a clone"
        )
