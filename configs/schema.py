"""Type and bounds of every configuration key; a key, type or value that is not allowed here fails with its name.

`register()` hands them to Hydra under the name `schema`, on which `config.yaml` is built. The groups' YAML files only
give values. Bounds stand in the fields' metadata, and ringflash.training.config.checks compares them: `choices`,
`at_least`, `positive`, `share` (0 up to, not including, 1), `bits` (of an unsigned integer) and `words` (allowed beside
numbers). Numbers are finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from ringflash.kernels.select import NAMES as KERNELS


def _bounded(default: Any, **bounds: Any) -> Any:
    return field(default=default, metadata=bounds)


FORMATS = ("text", "chat")

ROPE = {
    "default": ((), ()),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")),
    "longrope": (("short_factor", "long_factor"), ("factor", "original_max_position_embeddings", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}
"""Types of rotary embeddings, each with the keys that it needs and those that it takes beside these and rope_theta."""

ROPE_SCALINGS = {
    "linear": (),
    "ntk": (),
    "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Types of `model.rope_scaling`, each with the keys that it takes beside the factor."""

SCHEDULES = (
    "warmup_cosine",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@dataclass
class RopeScalingConfig:
    """How the recipe's own model stretches its rotary frequencies to contexts beyond the original one."""

    rope_type: str = _bounded("llama3", choices=tuple(ROPE_SCALINGS))
    """"linear", "ntk" (NTK-aware, by the base), "yarn" or "llama3"."""
    factor: float = _bounded(1.0, positive=True)
    """How much longer the context becomes; 1: all frequencies stay as they are."""
    low_freq_factor: float = _bounded(1.0, positive=True)
    """Of llama3: frequencies of fewer turns than this within the original context are divided by the factor."""
    high_freq_factor: float = _bounded(4.0, positive=True)
    """Of llama3: frequencies of more turns than this within the original context stay as they are."""
    original_max_position_embeddings: int = _bounded(8192, at_least=1)
    """Of llama3 and yarn: the original context, in tokens."""
    attention_factor: float | None = _bounded(None, positive=True)
    """Of yarn: factor of cosine and sine; null: 0.1 ln(factor) + 1."""
    beta_fast: float = _bounded(32.0, positive=True)
    """Of yarn: turns within the original context from which on frequencies stay."""
    beta_slow: float = _bounded(1.0, positive=True)
    """Of yarn: turns up to which frequencies are divided by the factor."""


@dataclass
class RopeParametersConfig:
    """Transformers' `rope_parameters`, under its names; null leaves what the folder's config.json says."""

    rope_type: str | None = _bounded(None, choices=tuple(ROPE))
    """"default", "linear", "dynamic", "yarn", "longrope" or "llama3"."""
    rope_theta: float | None = _bounded(None, positive=True)
    """Base of the frequencies."""
    factor: float | None = _bounded(None, positive=True)
    """How much longer the context becomes."""
    original_max_position_embeddings: int | None = _bounded(None, at_least=1)
    """The context that the model was trained with; null: config.json's, or its max_position_embeddings."""
    attention_factor: float | None = _bounded(None, positive=True)
    """Of yarn and longrope: factor of cosine and sine."""
    beta_fast: float | None = _bounded(None, positive=True)
    """Of yarn: turns from which on frequencies stay."""
    beta_slow: float | None = _bounded(None, positive=True)
    """Of yarn: turns up to which frequencies are divided by the factor."""
    short_factor: list[float] | None = None
    """Of longrope: one factor for each frequency, for sequences up to the original context."""
    long_factor: list[float] | None = None
    """Of longrope: the same for longer ones."""
    low_freq_factor: float | None = _bounded(None, positive=True)
    """Of llama3: as in model.rope_scaling."""
    high_freq_factor: float | None = _bounded(None, positive=True)
    """Of llama3: as in model.rope_scaling."""


@dataclass
class ModelConfig:
    """Shape of a Llama-style decoder, with the names of Hugging Face's LlamaConfig; or the folder of a model."""

    hidden_size: int = _bounded(0, at_least=0)
    """Width of the residual stream."""
    intermediate_size: int = _bounded(0, at_least=0)
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: int = _bounded(0, at_least=0)
    """Blocks of attention and feed-forward."""
    num_attention_heads: int = _bounded(0, at_least=0)
    """Query heads."""
    num_key_value_heads: int = _bounded(0, at_least=0)
    """Key and value heads; must divide the query heads."""
    head_dim: int | None = _bounded(None, at_least=1)
    """Width of a head, even; null: hidden_size / num_attention_heads."""
    vocab_size: int | None = _bounded(None, at_least=1)
    """Rows of the embedding; null: the tokenizer's size rounded up to a multiple of 64."""
    rope_theta: float = _bounded(10000.0, positive=True)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """How these are stretched to longer contexts."""
    rms_norm_eps: float = _bounded(1e-5, positive=True)
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""
    path: str | None = None
    """Hugging Face folder of the model to start from (model=pretrained); its config.json then says the shape."""
    rope_parameters: RopeParametersConfig = field(default_factory=RopeParametersConfig)
    """What to change of the rotary embedding of a model from a folder."""


@dataclass
class SourceConfig:
    """One of several sources that are mixed; what is null is as in `data`."""

    path: str = ""
    """As data.path."""
    weight: float = _bounded(1.0, positive=True)
    """Its share of the sequences, among the weights of all."""
    format: str | None = _bounded(None, choices=FORMATS)
    """As data.format."""
    text_field: str | None = None
    """As data.text_field."""
    streaming: bool | None = None
    """As data.streaming."""
    validation: str | None = None
    """As data.validation, of this source alone."""
    subset: str | None = None
    """As data.subset."""
    split: str | None = None
    """As data.split."""
    revision: str | None = None
    """As data.revision."""


@dataclass
class LoraConfig:
    """Low-rank adapters by peft, for a model of a folder, whose own weights then stay as they are."""

    rank: int = _bounded(0, at_least=0)
    """Rank of the adapters; 0: all weights are trained, and there are no adapters."""
    alpha: float | None = _bounded(None, positive=True)
    """What adapters add is scaled by alpha / rank; null: twice the rank."""
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of modules that get adapters, as q_proj; none: all linear ones but the output head."""


@dataclass
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    path: str | None = None
    """Folder or file: text, .json, .jsonl, .ndjson, .parquet, also compressed; null: Python's standard library."""
    format: str = _bounded("text", choices=FORMATS)
    """"text", of which all is learned, or "chat" (data=chat), of which an assistant's turns or a completion are."""
    text_field: str = "text"
    """Field or column that holds the text of JSON and parquet; within another one: meta.text."""
    tokenizer: str | None = None
    """"bpe" (trained on the training files and cached), "bytes", or a Hugging Face folder; null: model.path, or bpe."""
    vocab_size: int = 8192
    """Tokens of a BPE that is trained here."""
    validation_fraction: float = _bounded(0.05, positive=True, share=True)
    """Share of the files that is held out."""
    max_bytes: int | None = _bounded(None, at_least=1)
    """Read no more text than this; null: all of it."""
    cache_dir: str = "runs/cache"
    """Where trained tokenizers and token files are kept."""
    validation: str | None = None
    """Folder or file to validate on, in place of a share of data.path."""
    streaming: bool = False
    """Tokenize while training, and keep nothing; data.path may then be a data set of the Hugging Face hub."""
    subset: str | None = None
    """Of a data set of the hub: its configuration."""
    split: str = "train"
    """Of a data set of the hub: which part."""
    revision: str | None = None
    """Of a data set of the hub: commit, branch or tag."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several sources in place of data.path: [{path: a, weight: 3}, {path: b, format: chat}]."""


@dataclass
class AttentionConfig:
    """Mask and execution of attention."""

    mask: str = _bounded("causal", choices=("causal", "sliding_window", "chunked"))
    """"causal", "sliding_window" or "chunked"; documents of a packed sequence never see each other."""
    window: int = _bounded(1024, at_least=0)
    """Tokens before the query that a sliding window shows."""
    sink: int = _bounded(0, at_least=0)
    """First tokens of a document that stay visible outside the sliding window."""
    chunk: int = _bounded(8192, at_least=1)
    """Tokens of a chunk of the chunked mask."""
    partition: str | None = _bounded(None, choices=("contiguous", "zigzag", "balanced"))
    """How a sequence is sharded over ranks: "contiguous", "zigzag" or "balanced"; null: "balanced" for one sequence of
    packed documents, otherwise "zigzag"."""
    head_ranks: int | None = _bounded(None, at_least=1)
    """Ranks of a sequence that exchange heads for tokens in each layer (Ulysses), within a ring of such groups if it
    has more; 1: a ring alone. null: what is predicted to be fastest of 1 and all, and for a model of Transformers on
    "contiguous" shares as many as can."""
    kernel: str = _bounded("auto", choices=KERNELS)
    """Attention kernel; "auto" picks by device, dtype and head dimension."""
    deterministic: bool = False
    """Repeat bit for bit."""


@dataclass
class OptimizerConfig:
    """The optimizer, and its learning rate step by step."""

    lr: float = _bounded(3e-4, positive=True)
    """Highest learning rate."""
    min_lr_ratio: float = _bounded(0.1, share=True)
    """Learning rate at the end, as a share of the highest, of schedules that end above zero."""
    warmup_steps: int = _bounded(100, at_least=0)
    """Steps of linear warm-up."""
    beta1: float = _bounded(0.9, share=True)
    """Decay of the first moment."""
    beta2: float = _bounded(0.95, share=True)
    """Decay of the second moment."""
    eps: float = _bounded(1e-8, positive=True)
    """Added to the root of the second moment."""
    weight_decay: float = _bounded(0.1, at_least=0)
    """Of matrices; norms are not decayed."""
    clip: float = _bounded(1.0, at_least=0)
    """Highest gradient norm; 0: no clipping."""
    name: str = _bounded("adamw", choices=("adamw", "adamw_8bit", "muon"))
    """"adamw"; or for matrices between embedding and head, with AdamW for all else, "adamw_8bit", bitsandbytes' AdamW
    with moments of 8 bits (engine=ddp), or "muon", torch's Muon (ddp, and fsdp2 on the device)."""
    momentum: float = _bounded(0.95, share=True)
    """Of Muon."""
    schedule: str = _bounded("warmup_cosine", choices=SCHEDULES)
    """"warmup_cosine" (linear warm-up, then half a cosine down to min_lr_ratio), or a name of Transformers'
    get_scheduler; "warmup_stable_decay" is WSD."""
    decay_steps: int | None = _bounded(None, at_least=1)
    """Of warmup_stable_decay: last steps, in which the rate falls; null: a tenth of all."""


@dataclass
class EngineConfig:
    """How parameters, gradients and optimizer state live on the ranks."""

    name: str = _bounded("ddp", choices=("ddp", "fsdp2", "zero1", "zero2", "zero3"))
    """torch's "ddp" and "fsdp2", or DeepSpeed's "zero1", "zero2", "zero3"."""
    precision: str = _bounded("auto", choices=("auto", "fp32", "bf16"))
    """"fp32", "bf16" (master weights and optimizer stay fp32), or "auto": bf16 on a GPU that has it, else fp32."""
    memory: str = _bounded("auto", choices=("auto", "keep", "recompute", "offload", "offload_pairs"))
    """What is kept of each block for the backward pass: all of it ("keep"), or its input and attention's results, from
    which the rest is computed again, on the device ("recompute") or in host memory ("offload", and with the inputs of
    every second block computed again too, "offload_pairs"); attention never runs again. "auto": as much as a GPU has
    room for after the first step; "keep" on CPUs."""
    host_gib: float | None = _bounded(None, at_least=0)
    """Host memory that each rank may move blocks to; null: its part of 85% of what is free."""
    reduce: str = _bounded("fp32", choices=("fp32", "bf16"))
    """Of fsdp2: dtype in which gradients are summed over the ranks."""
    compile: bool = False
    """Of ddp and fsdp2: torch.compile compiles what blocks compute beside attention and tiles, and norms and
    feed-forwards of layers of Transformers. Of the recipe's own blocks most of that has kernels on GPUs already."""
    deepspeed: str | None = None
    """Of zero1 to zero3: DeepSpeed JSON of settings that take the place of the recipe's own."""
    offload: bool = False
    """Of fsdp2: weights, gradients and optimizer state are in host memory, and the optimizer steps there."""


@dataclass
class TrainConfig:
    """Length of the run and size of its batches."""

    steps: int = _bounded(100, at_least=1)
    """Optimizer steps."""
    epochs: float | None = _bounded(None, positive=True)
    """Passes over the training part, in place of train.steps: as many steps as hold them."""
    seqlen: int = _bounded(4096, at_least=2)
    """Tokens of a packed sequence, over all ranks that share it."""
    global_batch: int = _bounded(1, at_least=1)
    """Sequences of one optimizer step, over all ranks; stays the same on any number of ranks."""
    micro_batch: int = _bounded(1, at_least=1)
    """Sequences that one group of ranks works on at a time; the rest is gradient accumulation."""
    sequence_degree: int | None = _bounded(None, at_least=1)
    """Ranks that share a sequence; null: all. The remaining factor of the ranks is data parallel."""
    overfit: bool = False
    """Train on the first batch again and again, for debugging."""
    validate_every: int = _bounded(0, at_least=0)
    """Steps between validations; 0: only at the end."""
    validation_sequences: int | None = _bounded(None, at_least=1)
    """Packed sequences in a validation; null: all."""


@dataclass
class CheckpointConfig:
    """When to save and what to start from."""

    every: int | str = _bounded(0, at_least=0, words=("never",))
    """Steps between checkpoints; 0: only at the end; "never": not even then, nor when a signal stops the run."""
    only_weights: bool = False
    """Save no optimizer state: a new run can start from such a checkpoint, and none go on from it."""
    background: bool = True
    """Copy what is saved between two steps to host memory, and write it while training goes on; false: training waits
    for the disk, and no host memory is taken."""
    keep: int = _bounded(2, at_least=1)
    """Newest checkpoints that are kept."""
    resume: str = "auto"
    """"auto" (the newest complete checkpoint in the run directory, if any), "last_good" (the newest undamaged one,
    newer ones are set aside), "never", or a checkpoint's folder."""
    weights: str | None = None
    """Run's or checkpoint's folder of whose weights a new run starts, with other data, length, RoPE or seed."""


@dataclass
class LoggingConfig:
    """What is shown and written during the run."""

    every: int = _bounded(1, at_least=1)
    """Steps between entries."""
    progress: bool = True
    """Show the progress bar."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""
    plot: bool = True
    """Draw the loss curve and the loss by position at the end."""
    baselines: bool = True
    """Fit the byte n-gram models that validation is compared with."""
    wandb: bool = False
    """Log to Weights & Biases; the project is the configuration's name."""
    trackio: bool = False
    """Log to Trackio; likewise."""
    profile_steps: int = _bounded(0, at_least=0)
    """Steps that torch's profiler records, of every rank; 0: none."""
    profile_from: int | None = _bounded(None, at_least=1)
    """Number of the first of these steps; null: the third that is taken."""
    needle: bool = False
    """At the end, look for a sentence at five depths of contexts of up to train.seqlen tokens, and draw the result."""


@dataclass
class Config:
    """Everything a run is determined by."""

    name: str = "default"
    """Folder of the run under runs/."""
    run_dir: str | None = None
    """Where everything is written; null: runs/<name>/<start time>."""
    seed: int = _bounded(0, at_least=0, bits=64)
    """Of the initial weights and the data order."""
    device: str = _bounded("auto", choices=("auto", "cuda", "cpu"))
    """"cuda", "cpu", or "auto": cuda where there is one."""
    timeout: float = _bounded(600.0, positive=True)
    """Seconds after which a rank gives up on its peers."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """("train.steps", 300, its bounds) and so on, of each key of a configuration or a part of it."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from entries(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, entry.metadata


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Config)
