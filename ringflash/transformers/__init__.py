"""Hugging Face Transformers on ringflash: attention function, sequence parallelism, trainers.

import ringflash.transformers                                    # registers attn_implementation="ring"
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="ring")
sequence = ringflash.transformers.SequenceParallel(model, group=mesh["cp"])
loss = model(**sequence.shard(batch), use_cache=False).loss      # the same batch on every rank of the group
loss.backward()
"""

from transformers import AttentionInterface, AttentionMaskInterface

from ringflash.transformers.attention import ring_attention
from ringflash.transformers.masks import ring_mask
from ringflash.transformers.sequence_parallel import SequenceParallel
from ringflash.transformers.trainer import RingTrainer

AttentionInterface.register("ring", ring_attention)
AttentionMaskInterface.register("ring", ring_mask)

__all__ = ["RingTrainer", "SequenceParallel"]
