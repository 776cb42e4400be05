"""What of a corpus, or of a model's files, is left out, counted by kind, so that nothing is lost without a word."""

from __future__ import annotations

import os

HIDDEN = "hidden files and folders"
READ_ALREADY = "links to files and folders that are read already"
SPECIAL = "pipes, sockets and devices"
EMPTY = "empty files"
WITHOUT_TEXT = "rows without text"
UNPLACED = "tensors of model.path that the model has no place for"
CUT = "the whole of chats longer than a sequence, which are cut"
NOTHING_LEARNED = "chats in which nothing is learned"


class PassedOver:
    """How much of each kind was left out, and where the first of it is.

    Args:
        counts: kinds with number and place, as `counts` has them.
    """

    def __init__(self, counts: dict[str, tuple[int, str]] | None = None) -> None:
        self.counts = dict(counts or {})

    def add(self, kind: str, place: object) -> None:
        """Count one more."""
        number, first = self.counts.get(kind, (0, ""))
        # Names of files may be bytes that are no text.
        self.counts[kind] = number + 1, first or os.fsencode(str(place)).decode(errors="replace")

    def merge(self, counts: dict[str, tuple[int, str]]) -> None:
        """Count what another one has counted."""
        for kind, (number, place) in counts.items():
            there, first = self.counts.get(kind, (0, ""))
            self.counts[kind] = there + number, first or place

    def __str__(self) -> str:
        """As "passed over: empty files (2, the first is a.txt)"; no text at all if nothing was."""
        kinds = [f"{kind} ({number:,}, the first is {first})" for kind, (number, first) in self.counts.items()]
        return f"passed over: {'; '.join(kinds)}" if kinds else ""
