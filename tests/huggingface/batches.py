"""Batches as Hugging Face's collators make them, with the documents that they hold.

A batch holds documents; what a model should learn from it is the sum of what it learns from each of them alone. So the
truth for every kind of batch is one call of the eager model on one device, with one document in each row, which needs
neither packing nor masks: rows are filled up behind their ends, where a causal model does not look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from families import VOCABULARY
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

IGNORED = -100


@dataclass(frozen=True)
class Documents:
    """What a batch holds.

    Attributes:
        batch: as a collator makes it.
        ids: tokens of each document.
        targets: for each token of each document the next one, -100 where nothing is to be learned.
    """

    batch: dict
    ids: list[Tensor]
    targets: list[Tensor]

    @property
    def valid(self) -> int:
        """Number of targets."""
        return sum(int((target != IGNORED).sum()) for target in self.targets)


def draw(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Documents of random tokens; 0, 1 and 2 stand for padding, beginning and end."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def shifted(labels: Tensor) -> Tensor:
    """The targets of one document, from its labels."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORED)])


def whole(ids: list[Tensor]) -> Documents:
    """Rows of one document each, all of one length."""
    batch = {"input_ids": torch.stack(ids), "labels": torch.stack(ids)}
    return Documents(batch, ids, [shifted(x) for x in ids])


def masked_prompt(ids: list[Tensor], answer: int) -> Documents:
    """The same, of which only the last tokens are learned."""
    labels = [torch.cat([torch.full_like(x[:-answer], IGNORED), x[-answer:]]) for x in ids]
    batch = {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}
    return Documents(batch, ids, [shifted(x) for x in labels])


def padded(ids: list[Tensor], side: str) -> Documents:
    """One document in each row, filled up with padding as tokenizers do."""
    tokens = pad_sequence(ids, batch_first=True, padding_value=0, padding_side=side)
    real = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True, padding_side=side)
    batch = {"input_ids": tokens, "attention_mask": real, "labels": tokens.masked_fill(real == 0, IGNORED)}
    return Documents(batch, ids, [shifted(x) for x in ids])


def packed(rows: list[list[Tensor]], boundaries: bool) -> Documents:
    """Several documents in each row.

    Args:
        rows: documents of each row; rows are of one length.
        boundaries: one row, as `DataCollatorWithFlattening` packs it: with cu_seq_lens and max_length beside the
            position_ids, and no label at the first token of a document, which has nothing to come from. Without, the
            labels are all ids.
    """
    ids = [x for row in rows for x in row]
    labels = [torch.cat([x.new_full((1,), IGNORED), x[1:]]) for x in ids] if boundaries else ids
    batch = {
        "input_ids": _rows(ids, len(rows)),
        "labels": _rows(labels, len(rows)),
        "position_ids": _rows([torch.arange(len(x)) for x in ids], len(rows)),
    }
    if boundaries:
        lengths = torch.tensor([len(x) for x in ids])
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
    return Documents(batch, ids, [shifted(x) for x in ids])


def _rows(parts: list[Tensor], rows: int) -> Tensor:
    return torch.cat(parts).view(rows, -1)


KINDS: dict[str, Callable[[], Documents]] = {
    "one_document": lambda: whole(draw(37, 37)),
    "packed_with_boundaries": lambda: packed([draw(19, 1, 30, 11)], boundaries=True),
    "packed_by_positions": lambda: packed([draw(29, 12), draw(9, 32, seed=1)], boundaries=False),
    "masked_prompt": lambda: masked_prompt(draw(41, 41), answer=5),
    "right_padded": lambda: padded(draw(38, 15), "right"),
    "left_padded": lambda: padded(draw(13, 35), "left"),
}


def learn_alone(model: PreTrainedModel, documents: Documents) -> Tensor:
    """Mean loss per target of the documents, each in a row of its own, with gradients: the truth for their batch."""
    ids = pad_sequence(documents.ids, batch_first=True)
    targets = pad_sequence(documents.targets, batch_first=True, padding_value=IGNORED)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    return loss.detach()


def learn_together(model: PreTrainedModel, documents: Documents) -> Tensor:
    """Mean loss per target of the batch as it is, with gradients: for models that count tokens of a row."""
    named = ("input_ids", "position_ids", "attention_mask", "labels")
    batch = {key: x for key, x in documents.batch.items() if key in named}
    real = batch.get("attention_mask", torch.ones_like(batch["labels"]))
    begins = (torch.nn.functional.pad(real[:, :-1], (1, 0)) == 0) & (real == 1)
    if "position_ids" in batch:
        begins |= batch["position_ids"] == 0
    batch["labels"] = batch["labels"].masked_fill(begins, IGNORED)  # a first token has nothing to come from
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of all parameters by name."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in trained.items()}
