"""Needle in a haystack (Kamradt, 2023): whether a model finds one sentence again, anywhere in a long context.

A sentence with a number stands somewhere in held-out text, and its beginning once more at the end. Measured is the
probability that the model gives to the number there, of each token the correct one before it. So no text is generated,
and all ranks work on one context, as in training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringflash.errors import DataError
from ringflash.parallel.labels import IGNORED_LABEL
from ringflash.training.corpus.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the sentence stands, as a share of the text."""

HALVINGS = 4
"""So many lengths: the sequence's, and halves of it."""

SENTENCE, NUMBER = b"\nThe secret number of the lighthouse is ", b"48161."


class Needle(NamedTuple):
    """One context.

    Attributes:
        length: its tokens.
        depth: where the sentence stands, from 0 to 1.
        probability: of the number, at the end.
    """

    length: int
    depth: float
    probability: float


class Haystack(NamedTuple):
    """A context to measure, and what it is."""

    length: int
    depth: float
    batch: dict[str, Any]


def needle_lengths(tokenizer: Tokenizer, seqlen: int) -> list[int]:
    """Lengths of contexts that the sentence and its question go into.

    Raises:
        DataError: there is none up to seqlen.
    """
    needle = sum(map(len, tokenizer.encode([SENTENCE, NUMBER])))
    lengths = sorted({seqlen >> halving for halving in range(HALVINGS)})
    lengths = [length for length in lengths if length > 2 * (1 + 2 * needle)]
    if not lengths:
        raise DataError(f"logging.needle=true: a sentence and its question need more than train.seqlen={seqlen} tokens")
    return lengths


def haystacks(text: Sequence[np.ndarray], tokenizer: Tokenizer, seqlen: int) -> Iterator[Haystack]:
    """Contexts of all lengths and depths, each a batch of one sequence of `seqlen` tokens, labels at the number alone.

    Args:
        text: tokens of documents; they are repeated if they are few.
        tokenizer: theirs.
        seqlen: the longest length.
    """
    sentence, number = (tokens.tolist() for tokens in tokenizer.encode([SENTENCE, NUMBER]))
    needle, asked = [*sentence, *number], [*sentence, *number]
    head = [tokenizer.separator]
    endless = itertools.chain.from_iterable(itertools.cycle(text))
    hay = [int(token) for token in itertools.islice(endless, seqlen)]
    for length, depth in itertools.product(needle_lengths(tokenizer, seqlen), DEPTHS):
        around = hay[: length - len(head) - len(needle) - len(asked)]
        place = round(depth * len(around))
        ids = [*head, *around[:place], *needle, *around[place:], *asked]
        input_ids = torch.full((1, seqlen), tokenizer.separator, dtype=torch.int64)
        input_ids[0, :length] = torch.tensor(ids)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        labels[0, length - len(number) : length] = input_ids[0, length - len(number) : length]
        yield Haystack(length, depth, {"input_ids": input_ids, "labels": labels, "cu_seqlens": [0, length]})


def plot_needles(path: Path, needles: Sequence[Needle]) -> None:
    """Write a PNG of the probabilities by length and depth."""
    lengths = sorted({each.length for each in needles})
    grid = np.array([[each.probability for each in needles if each.length == length] for length in lengths]).T
    figure = Figure(figsize=(2 + 1.2 * len(lengths), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    axes.set(xlabel="tokens of context", ylabel="depth of the sentence", title="Probability of the number")
    for (row, column), value in np.ndenumerate(grid):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    figure.colorbar(image)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
