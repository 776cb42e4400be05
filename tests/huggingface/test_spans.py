"""Spans in a causal mask are what Transformers makes of a model's image tokens."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, masking_utils
from transformers.models.gemma3 import modeling_gemma3

from ringflash import Mask


def _spans(token_type_ids: list[int]) -> list[tuple[int, int]]:
    """Runs of image tokens, as docs/masks.md finds them."""
    edges = torch.tensor([0, *token_type_ids, 0]).eq(1).int().diff().nonzero().view(-1, 2)
    return edges.tolist()


@pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])
@settings(max_examples=30, deadline=None)
@given(token_type_ids=st.lists(st.sampled_from([0, 1, 1]), min_size=1, max_size=24))
def test_image_tokens_see_each_other_as_in_gemma_3(window: int | None, token_type_ids: list[int]) -> None:
    ids = [
        kind if place < 8 else 0  # an image is not longer than a window
        for kind, run in groupby(token_type_ids)
        for place, kind in enumerate(run)
    ]
    config = Gemma3TextConfig(sliding_window=window or 4096, attn_implementation="sdpa")
    name = "create_causal_mask" if window is None else "create_sliding_window_causal_mask"
    images = modeling_gemma3.get_block_sequence_ids_for_mask(torch.tensor([ids]))
    embeddings = torch.zeros(1, len(ids), 8)
    expected = getattr(masking_utils, name)(
        config, embeddings, attention_mask=None, past_key_values=None, block_sequence_ids=images
    )
    mask = Mask.causal(_spans(ids))
    mask = mask if window is None else mask & Mask.sliding_window(window - 1, None)
    found = [[mask.sees(query, key) for key in range(len(ids))] for query in range(len(ids))]
    assert found == expected[0, 0].tolist()
