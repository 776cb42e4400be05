"""The arguments of flash-attn's functions, checked and put in the words of `ringflash.functional.attention`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.probabilities import signed_probabilities
from ringflash.functional import attention, check_types
from ringflash.kernels.kept import Kept
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.positions.integers import check_flag, check_number, integers
from ringflash.parallel.positions.mask import Mask

Attention = Tensor | tuple[Tensor, Tensor, Tensor | None]
"""out, or (out, softmax_lse, S_dmask) if these were asked for."""


Window = Sequence[int | None] | None
"""(left, right); -1 or None for no bound, None for (-1, -1)."""

Longest = int | Tensor | None
"""Length of the longest sequence; None where the caller does not know it."""

_options = Kept()
"""`Options` by the arguments they were made of."""


@dataclass(frozen=True)
class Options:
    """The arguments that all functions share, checked, in the words of `ringflash.functional.attention`."""

    dropout: float
    scale: float | None
    mask: Mask
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool

    @staticmethod
    def of(
        dropout_p: float | None,
        softmax_scale: float | None,
        causal: bool,
        window_size: Window,
        softcap: float | None,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_attn_probs: bool,
    ) -> Options:
        """Options from flash-attn's arguments."""
        if alibi_slopes is not None:
            check_types({}, {"alibi_slopes": alibi_slopes})
        given = dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
        make = Options._of if torch.compiler.is_compiling() or alibi_slopes is not None else Options._once
        return make(alibi_slopes, *given)

    @staticmethod
    def _once(alibi_slopes: Tensor | None, *given: Any) -> Options:
        """`_of`, from checked arguments where they were given before."""
        try:
            found = _options.get(given)
        except TypeError:  # a window_size that is a list
            return Options._of(alibi_slopes, *given)
        return found or _options.add(given, Options._of(alibi_slopes, *given))

    @staticmethod
    def _of(
        alibi_slopes: Tensor | None,
        dropout_p: float | None,
        softmax_scale: float | None,
        causal: bool,
        window_size: Window,
        softcap: float | None,
        deterministic: bool,
        return_attn_probs: bool,
    ) -> Options:
        dropout_p = 0.0 if dropout_p is None else dropout_p
        check_number("dropout_p", dropout_p, ", or None for 0")
        if not 0 <= dropout_p < 1:
            raise ArgumentError(f"dropout_p={dropout_p}; allowed is 0 <= dropout_p < 1")
        left, right, softcap = score_rules(softmax_scale, causal, window_size, softcap)
        check_flag("deterministic", deterministic)
        check_flag("return_attn_probs", return_attn_probs)
        return Options(
            dropout_p,
            softmax_scale,
            Mask.sliding_window(left, right),
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )

    def draw_seed(self, q: Tensor) -> Tensor | None:
        """A seed for dropout that can be used twice; None where nobody will."""
        return torch.randint(2**62, (1,), device=q.device) if self.dropout and self.return_attn_probs else None

    def probabilities(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        seed: Tensor | None,
        boundaries: tuple[Tensor, Tensor],
        longest: tuple[int, int],
    ) -> Tensor | None:
        """S_dmask of packed q (total_q, nheads, headdim) and k, from lse (nheads, total_q)."""
        if seed is None:
            return None
        return signed_probabilities(
            q,
            k,
            lse,
            seed,
            boundaries[0].to(q.device),
            boundaries[1].to(q.device),
            longest,
            mask=self.mask,
            scale=q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            dropout=self.dropout,
        )


def score_rules(
    softmax_scale: float | None, causal: bool, window_size: Window, softcap: float | None
) -> tuple[int | None, int | None, float]:
    """Bounds of the window to the left and to the right, None for none, and softcap, 0 for none."""
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale, ", or None")
        if not 0 < softmax_scale < float("inf"):
            raise ArgumentError(f"softmax_scale={softmax_scale}; allowed are positive numbers, or None")
    softcap = 0.0 if softcap is None else softcap
    check_number("softcap", softcap, ", or None for none")
    if not softcap < float("inf"):
        raise ArgumentError(f"softcap={softcap}; allowed are positive numbers, 0 and less for none")
    check_flag("causal", causal)
    window = (-1, -1) if window_size is None else window_size
    one = not isinstance(window, Iterable) or (isinstance(window, Tensor) and not window.dim())
    sizes = () if one else integers("window_size", tuple([-1 if x is None else x for x in window]))
    if len(sizes) != 2 or min(sizes) < -1:
        raise ArgumentError(f"window_size={window_size}; allowed is (left, right), each -1 for no bound, or more")
    left, right = (None if x == -1 else x for x in sizes)
    return left, 0 if causal else right, max(float(softcap), 0.0)


def attend_batch(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attention:
    """Attention of a batch of sequences of one length, (batch, seqlen, nheads, headdim); see `flash_attn_func`."""
    q, k, v = (rows_together(name, x, 4) for name, x in (("q", q), ("k", k), ("v", v)))
    seed = options.draw_seed(q)
    out, lse = attention(
        q,
        k,
        v,
        mask=options.mask,
        group=ONE_DEVICE,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        dropout=options.dropout,
        dropout_seed=seed,
        deterministic=options.deterministic,
    )
    if not options.return_attn_probs:
        return out
    edges = torch.arange(q.shape[0] + 1, device=q.device)
    boundaries, longest = (edges * q.shape[1], edges * k.shape[1]), (q.shape[1], k.shape[1])
    packed = q.flatten(0, 1), k.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    return out, lse, options.probabilities(*packed, seed, boundaries, longest)


@overload
def unpack(name: str, packed: Tensor, count: Literal[2], dims: int) -> tuple[Tensor, Tensor]: ...


@overload
def unpack(name: str, packed: Tensor, count: Literal[3], dims: int) -> tuple[Tensor, Tensor, Tensor]: ...


def unpack(name: str, packed: Tensor, count: int, dims: int) -> tuple[Tensor, ...]:
    """Views of `count` tensors stacked in front of the heads, (..., count, nheads, headdim)."""
    check_types({name: packed})
    if packed.dim() != dims or packed.shape[-3] != count:
        shape = f"({'batch, seqlen' if dims == 5 else 'total'}, {count}, nheads, headdim)"
        raise ArgumentError(f"{name} has shape {tuple(packed.shape)}; allowed is {shape}")
    return packed.unbind(-3)


def rows_together(name: str, x: Tensor, dims: int) -> Tensor:
    """The tensor with a contiguous last dimension, copied if it has another, after a look at its shape."""
    if not isinstance(x, Tensor):
        check_types({name: x})
    if x.dim() != dims:
        allowed = "(batch, seqlen, nheads, headdim)" if dims == 4 else "(total, nheads, headdim)"
        raise ArgumentError(f"{name} has shape {tuple(x.shape)}; allowed is {allowed}")
    if dims == 4 and not x.shape[0]:
        raise ArgumentError(f"{name} has shape {tuple(x.shape)}; the batch must hold at least one sequence")
    return x if x.stride(-1) == 1 else x.contiguous()


def check_boundaries(name: str, cu_seqlens: Tensor, longest: Longest, q: Tensor, total: int | None) -> int | None:
    """What can be checked of boundaries, and of the longest sequence, without waiting for a device.

    Returns:
        The longest sequence, None if it was not given or would have to be waited for.
    """
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dim() != 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ArgumentError(f"{name}={cu_seqlens}; allowed is a one-dimensional int32 tensor")
    if cu_seqlens.shape[0] < 2:
        raise ArgumentError(f"{name} has {cu_seqlens.shape[0]} entries; allowed is the number of sequences + 1, from 2")
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != q.device:
        raise ArgumentError(f"{name} is on {cu_seqlens.device}, q on {q.device}; pass it there or on the CPU")
    known = _longest_at_hand(name_of_longest(name), longest)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return known
    if cu_seqlens[0] != 0 or cu_seqlens.diff().min() < 0:
        raise ArgumentError(f"{name}={cu_seqlens.tolist()}; it must start at 0 and never decrease")
    if total is not None and cu_seqlens[-1] > total:
        raise ArgumentError(f"{name} ends at {int(cu_seqlens[-1])}, behind the last of {total} tokens")
    if known is not None and (found := int(cu_seqlens.diff().max())) > known:
        raise ArgumentError(f"{name_of_longest(name)}={known}; the longest sequence has {found}")
    return known


def name_of_longest(name: str) -> str:
    """max_seqlen_q of cu_seqlens_q, and so on."""
    return name.replace("cu", "max").replace("seqlens", "seqlen")


def longest_needed(name: str, longest: Longest, needed_by: str) -> int:
    """The longest sequence as a number, where a size depends on it; a GPU is waited for if it is there.

    Args:
        name: of the argument.
        longest: its value.
        needed_by: what depends on it.
    """
    if longest is None or (isinstance(longest, Tensor) and torch.compiler.is_compiling()):
        what = "None" if longest is None else "a tensor in compiled code"
        raise ArgumentError(f"{name} is {what}; {needed_by} needs it as an integer")
    number = _longest_at_hand(name, longest)
    return int(longest) if number is None else number


def _longest_at_hand(name: str, longest: Longest) -> int | None:
    """The longest sequence, None if it was not given or lies where it would have to be waited for."""
    if isinstance(longest, Tensor):
        if longest.numel() != 1 or longest.is_floating_point() or longest.dtype == torch.bool:
            raise ArgumentError(f"{name} is {longest.dtype} {tuple(longest.shape)}; allowed is an integer, or None")
        if longest.device.type != "cpu" or torch.compiler.is_compiling():
            return None
    if longest is None:
        return None
    try:  # torch.compile does not know each integer, and takes no index of those
        number = longest if isinstance(longest, int) else operator.index(longest)
    except TypeError as error:
        raise ArgumentError(f"{name}={longest!r}; allowed is an integer, or None") from error
    if number < 0:
        raise ArgumentError(f"{name}={number}; allowed is 0 or more")
    return number
