"""Where the sequences of a batch begin and end among the rows of tensors, as boundaries that stay on their device.

Sequences of a batch differ in where they begin and end, and a static cache has more keys than it holds. Each is three
documents: what lies in front of its first visible key, what is visible, and what lies behind. The host reads none.

Legend: B sequences; T queries and S keys of one sequence in this call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringflash.errors import ArgumentError


class Rows(NamedTuple):
    """Three documents for each sequence.

    Attributes:
        cu_seqlens: boundaries over the B * S keys laid end to end, (3 B + 1,) int64.
        query_cu_seqlens: those over the B * T queries, (3 B + 1,).
        seen: (B, S) bool, which keys are visible; None where boundaries say it.
    """

    cu_seqlens: Tensor
    query_cu_seqlens: Tensor
    seen: Tensor | None

    def tensor(self) -> Tensor:
        """All of it in one tensor, (1, 1, 1, 6 B + 2) or with B * S more: four dimensions, as masks have them."""
        parts = [*self[:2], *(() if self.seen is None else (self.seen.flatten().long(),))]
        return torch.cat(parts)[None, None, None]

    @staticmethod
    def of_tensor(x: Tensor, batch: int, keys: int) -> Rows:
        """What `tensor` wrote, for B sequences of S keys."""
        flat, edges = x.flatten(), 3 * batch + 1
        seen = flat[2 * edges :]
        return Rows(flat[:edges], flat[edges : 2 * edges], seen.view(batch, keys).bool() if len(seen) else None)


def rows_of(
    batch: int,
    queries: tuple[int, int | Tensor],
    keys: tuple[int, int],
    padding: Tensor | None,
    chunk: int | None,
    anywhere: bool,
    device: torch.device | str,
) -> Rows:
    """Rows of a call.

    Args:
        batch: B.
        queries: T, and the position of the first query; a tensor where a static cache counts on the device.
        keys: S, and the position of the first key; a sliding cache has let earlier ones go.
        padding: (B, positions) bool, False for tokens that nobody sees; None without any.
        chunk: size of the layer's chunks, counted from the first token of each sequence that is seen.
        anywhere: a query sees the same keys wherever it stands; it may be another sequence's, as in cross attention.
        device: where the rows are to be.
    """
    first_query = torch.as_tensor(queries[1], device=device)
    place = first_query - keys[1]
    if padding is None:
        begin = torch.zeros(batch, dtype=torch.int64, device=device)
        end, seen, first = begin + place + queries[0], None, begin
    else:
        begin, end, seen, first = _visible(padding, keys)
    if chunk is not None and keys[1] > 0:
        if queries[0] > 1:
            raise ArgumentError(
                f"{queries[0]} queries behind a cache that has let {keys[1]} tokens go, with chunks of {chunk}; "
                "allowed is one query at a time"
            )
        begin = torch.maximum(begin, first + (first_query - first) // chunk * chunk - keys[1])
    number = torch.arange(batch, device=device)[:, None]
    key_edges = torch.stack([torch.zeros_like(begin), begin, end], 1) + number * keys[0]
    query_edges = (torch.stack([place.expand_as(begin), begin, end], 1) - place).clamp(0, queries[0])
    if anywhere:
        query_edges = query_edges.new_tensor([0, 0, queries[0]]).expand(batch, -1)
    query_edges = query_edges + number * queries[0]
    return Rows(_closed(key_edges, batch * keys[0]), _closed(query_edges, batch * queries[0]), seen)


def ends_of(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sequence the first token that is seen, and the end of the last one, (B,); (0, 0) where none is.

    Args:
        seen: (B, S) bool.
    """
    place = torch.arange(seen.shape[1], device=seen.device)
    end = torch.where(seen, place + 1, 0).amax(1)
    return torch.minimum(torch.where(seen, place, seen.shape[1]).amin(1), end), end


def document_boundaries(restarts: Tensor) -> Tensor:
    """Boundaries of packed documents over B * T tokens, as many as there are tokens: most are of empty documents.

    Args:
        restarts: (B, T - 1) bool, whether a token begins another document than the one before it.
    """
    begins = pad(restarts, (1, 0), value=True).flatten()
    tokens = torch.arange(begins.numel(), device=begins.device)
    return _closed(torch.where(begins, tokens, begins.numel()).sort().values, begins.numel())


def _visible(padding: Tensor, keys: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Of each sequence the first visible key, the end of the last, and the first position that is ever seen.

    Third, which keys are visible, (B, S), if others lie between.
    """
    seen = padding[:, keys[1] : keys[1] + keys[0]]
    seen = pad(seen, (0, keys[0] - seen.shape[1]))
    begin, end = ends_of(seen)
    between = torch.compiler.is_compiling() or bool((seen.sum(1) != end - begin).any())
    return begin, end, seen if between else None, ends_of(padding)[0]


def _closed(edges: Tensor, total: int) -> Tensor:
    return pad(edges.flatten(), (0, 1), value=total)
