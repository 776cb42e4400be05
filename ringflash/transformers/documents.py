"""Which tokens of a Hugging Face batch belong together, read from whatever key says it.

Packed documents are named by `cu_seq_lens_q`, by `seq_idx`, or by `position_ids` that restart, in this order, as
Transformers' own attention reads them. Padding in front of a sequence and behind it is a document of its own, which
costs attention nothing; padding between tokens is hidden key by key.

Legend: B sequences, S tokens of one sequence over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringflash.errors import ArgumentError
from ringflash.transformers.rows import ends_of

BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Keys that hold boundaries of documents over the B * S tokens laid end to end."""


class Documents(NamedTuple):
    """Documents and padding of a batch, on the CPU.

    Attributes:
        cu_seqlens: boundaries over the B * S tokens laid end to end, (documents + 1,) int64; None for one document a
            sequence.
        seen: (B, S) bool, False where there is padding; None without any.
        scattered: whether padding lies between tokens, where boundaries do not hide it.
    """

    cu_seqlens: Tensor | None
    seen: Tensor | None
    scattered: bool

    def ends(self) -> tuple[Tensor, Tensor]:
        """First token of each sequence that is seen, and the end of the last one, (B,), where there is padding."""
        assert self.seen is not None
        return ends_of(self.seen)


def documents_of(batch: Mapping[str, object], size: int, seqlen: int) -> Documents:
    """Documents of a batch of B=`size` sequences of S=`seqlen` tokens.

    Raises:
        ArgumentError: keys that contradict each other, or values that mean something else.
    """
    seen = _seen(batch.get("attention_mask"), size, seqlen)
    edges, tail = _edges(batch, size, seqlen, seen), size * seqlen
    if edges is not None and _is_given(batch):
        tail = int(edges[-1])
    scattered = False
    if seen is not None:
        first, stop = ends_of(seen)
        scattered = bool((seen.sum(1) != stop - first).any())
        rows = (torch.stack([first, stop], 1) + torch.arange(size)[:, None] * seqlen).flatten()
        edges = rows if edges is None else torch.cat([edges, rows])
        tail = min(tail, int(rows.max()))
    if edges is None:
        return Documents(None, seen, scattered)
    cu_seqlens = torch.cat([edges, edges.new_tensor([0, tail])]).unique()  # sorted
    cu_seqlens = cu_seqlens[cu_seqlens <= tail]
    return Documents(cu_seqlens if len(cu_seqlens) > 1 else cu_seqlens.new_zeros(2), seen, scattered)


def _is_given(batch: Mapping[str, object]) -> bool:
    return any(batch.get(name) is not None for name in BOUNDARIES)


def _seen(attention_mask: object, size: int, seqlen: int) -> Tensor | None:
    """(B, S) bool; None where everything is seen."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (size, seqlen):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ArgumentError(f"attention_mask is {shape}; allowed is {(size, seqlen)}, (batch, seqlen), of 0 and 1")
    mask = attention_mask.cpu()
    seen = mask.bool()
    if bool((mask != seen).any()):
        raise ArgumentError(
            f"attention_mask holds {mask.unique().tolist()[:8]}; allowed are 0 and 1. Documents are named by seq_idx, "
            "cu_seq_lens_q and cu_seq_lens_k, or position_ids that restart"
        )
    return None if bool(seen.all()) else seen


def _edges(batch: Mapping[str, object], size: int, seqlen: int, seen: Tensor | None) -> Tensor | None:
    """Where documents begin, or boundaries that were given; None where nothing names documents."""
    if (edges := _given_boundaries(batch, size * seqlen)) is not None:
        return edges
    numbers, step = batch.get("seq_idx"), 0
    if numbers is None:
        numbers, step = batch.get("position_ids"), 1
    if isinstance(numbers, Tensor) and numbers.dim() == 3 and numbers.shape[0] == 4:
        numbers = numbers[0]  # multimodal RoPE: Transformers reads documents from the first of four, that of text
    if isinstance(numbers, Tensor) and numbers.dim() < 2:
        raise ArgumentError(
            f"{'position_ids' if step else 'seq_idx'} is {tuple(numbers.shape)}; allowed is {(size, seqlen)}"
        )
    if not isinstance(numbers, Tensor) or numbers.dim() != 2:
        return None
    numbers = numbers.cpu().expand(size, -1)
    if tuple(numbers.shape) != (size, seqlen):
        raise ArgumentError(
            f"{'position_ids' if step else 'seq_idx'} is {tuple(numbers.shape)}; allowed is {(size, seqlen)}"
        )
    restarts = numbers.diff(dim=1) != step
    if step and seen is not None:
        if bool((restarts & seen[:, 1:] & seen[:, :-1]).any()):
            raise ArgumentError(
                "position_ids restart between tokens, and attention_mask hides some: Transformers reads documents from "
                "position_ids only without a mask. Name them by seq_idx, or by cu_seq_lens_q and cu_seq_lens_k"
            )
        return None
    if not bool(restarts.any()):
        return None
    return pad(restarts, (1, 0), value=True).flatten().nonzero().flatten()


def _boundaries(name: str, given: object) -> Tensor:
    try:
        edges = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} is {type(given).__name__}: {error}; allowed are integers") from error
    if edges.is_floating_point() or edges.is_complex() or edges.dtype == torch.bool:
        raise ArgumentError(f"{name} is {edges.dtype}; allowed are integers")
    return edges.long()


def _given_boundaries(batch: Mapping[str, object], tokens: int) -> Tensor | None:
    given = {name: batch[name] for name in BOUNDARIES if batch.get(name) is not None}
    if not given:
        return None
    edges = {name: _boundaries(name, x) for name, x in given.items()}
    name, first = next(iter(edges.items()))
    for other, x in edges.items():
        if not torch.equal(x, first):
            raise ArgumentError(f"{other}={x.tolist()[:8]}, {name}={first.tolist()[:8]}; make them agree")
    if first.dim() != 1 or len(first) < 2 or first[0] != 0 or bool((first.diff() < 0).any()) or first[-1] > tokens:
        raise ArgumentError(
            f"{name}={first.tolist()[:8]}; allowed are boundaries that ascend from 0 to at most the {tokens} tokens"
        )
    return first
