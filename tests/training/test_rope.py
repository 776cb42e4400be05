"""Rotary frequencies for longer contexts: what their authors published, and what Transformers computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.configs.schema import RopeScalingConfig
from ringflash.training.model.rope import as_transformers, attention_factor, frequencies, ntk_theta, rotary

# Some of the frequencies of models and code that their authors published, of heads of 128, by index:
PUBLISHED = {
    # LongChat-7b-16k: positions of Llama divided by 8
    "linear": (
        1e4,
        RopeScalingConfig("linear", 8.0),
        {0: 0.125, 16: 0.0125, 24: 0.003952847075, 33: 0.001082455404, 63: 1.443477481e-05},
    ),
    # jquesnelle/yarn, LlamaNTKScaledRotaryEmbedding: Llama's base, alpha 8
    "ntk": (
        1e4,
        RopeScalingConfig("ntk", 8.0),
        {0: 1.0, 16: 0.05897172244, 24: 0.01432074855, 33: 0.002913753874, 63: 1.443477481e-05},
    ),
    # jquesnelle/yarn, LlamaYaRNScaledRotaryEmbedding: Yarn-Llama-2-64k, factor 16 of 4,096
    "yarn": (
        1e4,
        RopeScalingConfig("yarn", 16.0, original_max_position_embeddings=4096),
        {0: 1.0, 16: 0.1, 24: 0.02706179921, 30: 0.008526843773, 40: 0.0008817889629, 63: 7.217387404e-06},
    ),
    # meta-llama/llama-models, apply_scaling: Llama 3.1, factor 8 of 8,192
    "llama3": (
        5e5,
        RopeScalingConfig("llama3", 8.0),
        {0: 1.0, 24: 0.007292664737, 30: 0.001371893568, 33: 0.0003126937504, 40: 3.428102196e-05, 63: 3.068925989e-07},
    ),
}


@pytest.mark.parametrize(("theta", "scaling", "values"), PUBLISHED.values(), ids=PUBLISHED)
def test_frequencies_are_those_that_their_authors_published(theta, scaling, values):
    found = frequencies(128, theta, scaling)
    assert found.shape == (64,)
    assert {index: found[index].item() for index in values} == pytest.approx(values, rel=1e-9)


def test_yarn_sharpens_attention_as_published_and_ntk_has_the_published_base():
    yarn = PUBLISHED["yarn"][1]
    assert attention_factor(yarn) == pytest.approx(1.2772588722)  # of Yarn-Llama-2-64k
    assert attention_factor(RopeScalingConfig("yarn", 16.0, attention_factor=1.1)) == 1.1
    assert ntk_theta(128, 1e4, PUBLISHED["ntk"][1]) == pytest.approx(82684.6226)
    plain = RopeScalingConfig()
    position = torch.arange(9)[None]
    for sharp, one in zip(rotary(position, 128, 1e4, yarn), rotary(position, 128, 1e4, plain), strict=True):
        torch.testing.assert_close(sharp[..., 0], 1.2772588722 * one[..., 0])  # the fastest one stays otherwise


@given(
    kind=st.sampled_from(["linear", "ntk", "yarn", "llama3"]),
    factor=st.floats(1.0, 64.0),
    theta=st.floats(100.0, 1e7),
    width=st.sampled_from([16, 64, 96, 128]),
    original=st.sampled_from([512, 4096, 8192, 32768]),
)
def test_frequencies_are_those_of_transformers(kind, factor, theta, width, original):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    more = {"original_max_position_embeddings": original} if kind in ("yarn", "llama3") else {}
    scaling = RopeScalingConfig(kind, factor, **more)
    rope = as_transformers(width, theta, scaling)
    shape = {"hidden_size": 4 * width, "num_attention_heads": 4, "head_dim": width}
    config = transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=int(factor * original), **shape)
    if rope["rope_type"] == "default":
        expected, sharpened = 1 / rope["rope_theta"] ** (torch.arange(0, width, 2) / width), 1.0
    else:
        expected, sharpened = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(frequencies(width, theta, scaling).float(), expected, rtol=1e-4, atol=0)
    assert attention_factor(scaling) == pytest.approx(sharpened)
