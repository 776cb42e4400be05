"""Several continuations of one prompt, laid end to end behind it, and groups of them packed one after another.

A group is a prompt and its branches. A token of the prompt sees the prompt; one of a branch sees its branch and, in
front of it, the prompt, but no other branch. Both are intervals of keys whose ends never step back over a sequence.

    Branches(((4, 2, 3),))      # tokens 0 to 3 are a prompt, 4 and 5 its first branch, 6 to 8 its second one
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.segments import Interval


@dataclass(frozen=True)
class Branches:
    """Where prompts and their branches lie.

    Attributes:
        groups: for each group the tokens of its prompt, and then those of each branch; any of them may be 0.
    """

    groups: tuple[tuple[int, ...], ...]

    @staticmethod
    def of_lengths(prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> Branches:
        """From what users pass; arguments as in `Mask.shared_prefix`."""
        firsts = integers("shared_prefix: prompts", prompts)
        if len(firsts) != len(branches) or not firsts:
            raise ArgumentError(
                f"shared_prefix: {len(firsts)} prompts and the branches of {len(branches)}; allowed are as many, from 1"
            )
        behind = [integers(f"shared_prefix: branches[{i}]", lengths) for i, lengths in enumerate(branches)]
        groups = tuple((first, *lengths) for first, lengths in zip(firsts, behind, strict=True))
        for group in groups:
            if min(group) < 0:
                raise ArgumentError(
                    f"shared_prefix: a prompt of {group[0]} with branches of {list(group[1:])}; allowed are lengths "
                    "from 0"
                )
        return Branches(groups)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where groups begin, and where the last one ends."""
        return (0, *itertools.accumulate(map(sum, self.groups)))

    @cached_property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """Start and stop of each prompt and branch, and of the prompt in front of it.

        That of a prompt itself is empty: it starts with the prompt and stops with the one before. So a tile of queries
        over the edge of two groups works on one prompt, from the first query's start to the last one's stop, and not on
        the branches behind it too. Behind the last one is an empty piece, for tokens that belong to none.
        """
        rows, begin, before = [], 0, 0
        for prompt, *lengths in self.groups:
            rows.append((begin, begin + prompt, begin, before))
            before = begin + prompt
            edges = itertools.accumulate(lengths, initial=begin + prompt)
            rows += [(start, stop, begin, begin + prompt) for start, stop in itertools.pairwise(edges)]
            begin += prompt + sum(lengths)
        rows.append((begin,) * 4)
        return tuple(zip(*rows, strict=True))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where prompts and branches that have tokens begin."""
        return tuple(start for start, stop in zip(*self.pieces[:2], strict=True) if start < stop)

    def tokens_before(self, positions: Tensor, begins: Tensor) -> Tensor:
        """How many tokens stand before each one in its prompt, or in its branch and the prompt in front of it, (T,).

        Args:
            positions: (T,) int64 on the CPU.
            begins: (T,) int64 where the document of each begins; what lies before that does not count.
        """
        edges = torch.tensor(self.pieces)
        starts, _, prompt_starts, prompt_stops = edges[:, torch.searchsorted(edges[0], positions, right=True) - 1]
        of_prompt = prompt_stops - torch.maximum(prompt_starts, begins)
        return positions - torch.maximum(starts, begins) + of_prompt.clamp_(min=0)

    def around(self, position: int) -> tuple[Interval, Interval]:
        """The prompt in front of a position, empty in a prompt itself, and the prompt or branch that holds it."""
        starts, stops, prompt_starts, prompt_stops = self.pieces
        index = max(0, bisect_right(starts, position) - 1)
        return (prompt_starts[index], prompt_stops[index]), (starts[index], stops[index])
