"""Types of every configuration key; a key or type that is not here fails with its name.

`register()` hands them to Hydra under the name `schema`, on which `config.yaml` is built. The groups' YAML files only
give values. Choices are plain strings: ringflash.training.config.check names the key and lists what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class RopeScalingConfig:
    """Llama-3's stretching of the slow rotary frequencies to contexts beyond the original one."""

    factor: float = 1.0
    """Frequencies below the low bound are divided by this; 1: all stay as they are."""
    low_freq_factor: float = 1.0
    """Frequencies of fewer turns than this within the original context count as low."""
    high_freq_factor: float = 4.0
    """Frequencies of more turns than this within the original context stay as they are."""
    original_max_position_embeddings: int = 8192
    """The original context, in tokens."""


@dataclass
class ModelConfig:
    """Shape of a Llama-style decoder; names are those of Hugging Face's LlamaConfig."""

    hidden_size: int = MISSING
    """Width of the residual stream."""
    intermediate_size: int = MISSING
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: int = MISSING
    """Blocks of attention and feed-forward."""
    num_attention_heads: int = MISSING
    """Query heads."""
    num_key_value_heads: int = MISSING
    """Key and value heads; must divide the query heads."""
    head_dim: int | None = None
    """Width of a head, even; null: hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the tokenizer's size rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Llama-3 frequency scaling."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""


@dataclass
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    path: str | None = None
    """Folder of text files, a .txt, .jsonl or .parquet file; null: the running interpreter's standard library."""
    text_field: str = "text"
    """Field (jsonl) or column (parquet) that holds the text."""
    tokenizer: str = "bpe"
    """"bpe" (trained on the training files and cached), "bytes", or a Hugging Face tokenizer folder."""
    vocab_size: int = 8192
    """Tokens of a BPE that is trained here."""
    validation_fraction: float = 0.05
    """Share of the files that is held out."""
    max_bytes: int | None = None
    """Read no more text than this; null: all of it."""
    cache_dir: str = "runs/cache"
    """Where trained tokenizers and token files are kept."""


@dataclass
class AttentionConfig:
    """Mask and execution of attention."""

    mask: str = "causal"
    """"causal", "sliding_window" or "chunked"; documents of a packed sequence never see each other."""
    window: int = 1024
    """Tokens before the query that a sliding window shows."""
    sink: int = 0
    """First tokens of a document that stay visible outside the sliding window."""
    chunk: int = 8192
    """Tokens of a chunk of the chunked mask."""
    partition: str = "zigzag"
    """How a sequence is dealt to ranks: "contiguous", "zigzag" or "balanced"."""
    kernel: str = "auto"
    """Attention kernel; "auto" picks by device, dtype and head dimension."""
    deterministic: bool = False
    """Repeat bit for bit."""


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a share of the highest."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Of matrices; norms are not decayed."""
    clip: float = 1.0
    """Highest gradient norm; 0: no clipping."""


@dataclass
class EngineConfig:
    """How parameters, gradients and optimizer state live on the ranks."""

    name: str = "ddp"
    """"ddp", or DeepSpeed's "zero1", "zero2", "zero3"."""
    precision: str = "auto"
    """"fp32", "bf16" (master weights and optimizer stay fp32), or "auto": bf16 on a GPU that has it, else fp32."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass, except for its attention."""


@dataclass
class TrainConfig:
    """Length of the run and size of its batches."""

    steps: int = 100
    """Optimizer steps."""
    seqlen: int = 4096
    """Tokens of a packed sequence, over all ranks that share it."""
    global_batch: int = 1
    """Sequences of one optimizer step, over all ranks; stays the same on any number of ranks."""
    micro_batch: int = 1
    """Sequences that one group of ranks works on at a time; the rest is gradient accumulation."""
    sequence_degree: int | None = None
    """Ranks that share a sequence; null: all. The remaining factor of the ranks is data parallel."""
    overfit: bool = False
    """Train on the first batch again and again, for debugging."""
    validate_every: int = 0
    """Steps between validations; 0: only at the end."""
    validation_sequences: int | None = None
    """Packed sequences in a validation; null: all."""


@dataclass
class CheckpointConfig:
    """When to save and what to start from."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: str = "auto"
    """"auto" (the newest complete checkpoint in the run directory, if any), "never", or a checkpoint's folder."""


@dataclass
class LoggingConfig:
    """What is shown and written during the run."""

    every: int = 1
    """Steps between entries."""
    progress: bool = True
    """Show the progress bar."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""
    plot: bool = True
    """Draw the loss curve and the loss by position at the end."""
    baselines: bool = True
    """Fit the byte n-gram models that validation is compared with."""


@dataclass
class Config:
    """Everything a run is determined by."""

    name: str = "default"
    """Folder of the run under runs/."""
    run_dir: str | None = None
    """Where everything is written; null: runs/<name>/<start time>."""
    seed: int = 0
    """Of the initial weights and the data order."""
    device: str = "auto"
    """"cuda", "cpu", or "auto": cuda where there is one."""
    timeout: float = 600.0
    """Seconds after which a rank gives up on its peers."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Config)
