"""The Hugging Face models that suites `prefill` and `tax` run: public shapes with random weights, or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

try:
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
except ModuleNotFoundError as missing:
    raise SystemExit(f"this suite needs {missing.name}: pip install 'ringflash[huggingface]'") from missing

PUBLIC: dict[str, dict[str, Any]] = {
    "Mistral-7B": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    },
    "Llama-3-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    },
    "Phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
        "rope_theta": 10000.0,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
    },
}
"""Values of the config.json files of Mistral-7B-v0.1, Meta-Llama-3-8B and phi-2."""

SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B with a quarter of its layers and its vocabulary, so that the parts of a step keep their proportions."""

SHRUNK = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""What `shrink` divides; the head dimension stays."""

SHRINKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Model:
    """A model that can be built.

    Attributes:
        name: what it is called in tables.
        config: its shape.
        path: folder of its weights; None for random ones.
    """

    name: str
    config: PretrainedConfig
    path: str | None = None

    def weights(self) -> int:
        """How many it has."""
        with torch.device("meta"):
            return sum(x.numel() for x in AutoModelForCausalLM.from_config(self.config).parameters())

    def build(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model on a device, for evaluation; the same weights on every rank."""
        torch.manual_seed(0)
        if self.path is not None:
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, local_files_only=True)
            return model.to(device).eval()
        with device:  # where random weights are drawn much faster than on the host, if it is a GPU
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()


def models(path: str, shrink: int) -> list[Model]:
    """The public shapes, layers and widths divided by `shrink`; or the one model of a folder."""
    if path:
        if shrink != 1:
            raise SystemExit(f"shrink={shrink}: a model of a folder (path={path}) stays as it is")
        return [
            Model(path.rstrip("/").rpartition("/")[2], AutoConfig.from_pretrained(path, local_files_only=True), path)
        ]
    return [shrunk(name, shape, shrink) for name, shape in PUBLIC.items()]


def shrunk(name: str, shape: dict[str, Any], shrink: int) -> Model:
    """A shape with its layers and widths divided by `shrink`; exits with what is allowed where heads do not divide."""
    if shrink not in SHRINKS:
        raise SystemExit(f"shrink={shrink}: allowed are {', '.join(map(str, SHRINKS))}, which divide the heads")
    shape = shape | {key: max(1, shape[key] // shrink) for key in SHRUNK}
    return Model(name if shrink == 1 else f"{name} / {shrink}", AutoConfig.for_model(**shape))
