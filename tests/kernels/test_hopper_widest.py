"""Which kernels the Hopper package launches at head dimension 512, and where it has none, without a GPU."""

from __future__ import annotations

from contextlib import suppress
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from aot import blocks_on_paper

from ringflash.errors import ArgumentError
from ringflash.kernels import hopper
from ringflash.kernels.hopper import backward, checks, forward, widest
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.modifiers import Modifiers

PLAIN = causal_intervals(8, 8)
TOKENS = KeyIntervals(PLAIN.start + 1, PLAIN.stop + 1, 8, torch.zeros(8), torch.ones(8))

BLOCKS = PLAIN.with_blocks(blocks_on_paper(8, 8, 4, device="cpu"))


def operands(dim: int, value_dim: int) -> tuple[torch.Tensor, ...]:
    return torch.zeros(8, 2, dim), torch.zeros(8, 1, dim), torch.zeros(8, 1, value_dim)


@pytest.mark.parametrize(
    ("intervals", "modifiers", "portable"),
    [(PLAIN, None, False), (TOKENS, None, True), (BLOCKS, None, True), (PLAIN, Modifiers(softcap=3.0), True)],
    ids=["plain", "sink tokens", "blocks", "softcap"],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_modifiers_sink_tokens_and_blocks_go_to_the_portable_kernels(
    intervals: KeyIntervals, modifiers: Modifiers | None, portable: bool, deterministic: bool
) -> None:
    query, key, value = operands(512, 512)
    numbers = torch.zeros(2, 8)
    settings = {"scale": 0.1, "modifiers": modifiers}
    with mock.patch.object(forward, "widest") as ours, mock.patch.object(forward, "portable") as theirs:
        ours.takes = widest.takes
        hopper.attend(query, key, value, intervals, **settings)
    assert (ours.attend.called, theirs.attend.called) == (not portable, portable)
    with mock.patch.object(backward, "widest") as ours, mock.patch.object(backward, "portable") as theirs:
        ours.takes = widest.takes
        gradients = (query, query, key, value, numbers, numbers, intervals)
        hopper.attend_backward(*gradients, **settings, deterministic=deterministic)
    assert (ours.attend_backward.called, theirs.attend_backward.called) == (not portable, portable)


@pytest.mark.parametrize("intervals", [TOKENS, BLOCKS], ids=["sink tokens", "blocks"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_that_repeat_beside_sink_tokens_and_blocks_come_from_the_portable_kernels(
    dim: int, intervals: KeyIntervals
) -> None:
    query, key, value = operands(dim, dim)
    numbers = torch.zeros(2, 8)
    of_rows = (query, query, key, value, numbers, numbers)
    for shown, deterministic, portable in ((intervals, True, True), (intervals, False, False), (PLAIN, True, False)):
        with (
            mock.patch.object(backward, "portable") as theirs,
            mock.patch.object(backward, "_call", side_effect=KeyError("its own")) as ours,
            suppress(KeyError),
        ):
            hopper.attend_backward(*of_rows, shown, scale=0.1, deterministic=deterministic)
        assert theirs.attend_backward.called == portable == (not ours.called)


def test_values_of_another_head_dimension_are_refused() -> None:
    with (
        mock.patch.object(checks, "runs_on", return_value=None),
        pytest.raises(ArgumentError, match="head dimensions 512 and 256"),
    ):
        hopper.attend(*operands(512, 256), PLAIN, scale=0.1)
