"""flash-attn as a package: its functions, its padding and its rotary embedding by their own names and signatures.

    from ringflash.flash_attn import flash_attn_func, flash_attn_with_kvcache
    from ringflash.flash_attn.bert_padding import pad_input, unpad_input
    from ringflash.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb

Code that says `flash_attn` finds it there after `ringflash.compat.install("flash_attn")`.

Not here: flash-attn's compiled extensions, fused layers and losses, its private functions, FlashAttention-4
(`flash_attn.cute`), and FlashAttention-3's module `flash_attn_interface`. The last returns out or (out, softmax_lse)
depending on its version, and takes arguments that these kernels have nothing exact for: second queries for the values
(qv) and 8-bit tensors with their scales.
"""

from ringflash.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__version__ = "2.8.3"
"""The flash-attn whose names and signatures these are."""
