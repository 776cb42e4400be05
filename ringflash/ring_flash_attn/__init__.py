"""ring-flash-attn's functions on this ring, by their own names, signatures and layouts of tokens.

    from ringflash.ring_flash_attn import zigzag_ring_flash_attn_func
    out = zigzag_ring_flash_attn_func(q, k, v, causal=True)      # this rank's rows of flash_attn_func's result

Every function gives what flash-attn gives for the whole sequence. Which tokens a rank has to pass is part of a name:

    ring_*, llama3_*    piece r of the sequence's `ranks` equal pieces
    zigzag_ring_*       pieces r and 2 * ranks - 1 - r of 2 * ranks, one behind the other
    stripe_*            tokens r, r + ranks, r + 2 * ranks and so on
    *_varlen_*          the same of each packed sequence by itself, with cu_seqlens of this rank's tokens; llama3_*
                        instead cuts all packed sequences together

Causal or not, with windows, ALiBi slopes and dropout, all of them work on any number of ranks. Whatever else ringflash
does, such as softcap, sinks and lengths that differ from rank to rank, `ringflash.functional.attention` has.
"""

from ringflash.ring_flash_attn.adapters import substitute_hf_flash_attn, update_ring_flash_attn_params
from ringflash.ring_flash_attn.llama3_flash_attn_varlen import (
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_func,
    llama3_flash_attn_varlen_kvpacked_func,
    llama3_flash_attn_varlen_qkvpacked_func,
)
from ringflash.ring_flash_attn.ring_flash_attn import (
    ring_flash_attn_func,
    ring_flash_attn_kvpacked_func,
    ring_flash_attn_qkvpacked_func,
)
from ringflash.ring_flash_attn.ring_flash_attn_varlen import (
    ring_flash_attn_varlen_func,
    ring_flash_attn_varlen_kvpacked_func,
    ring_flash_attn_varlen_qkvpacked_func,
)
from ringflash.ring_flash_attn.stripe_flash_attn import (
    stripe_flash_attn_func,
    stripe_flash_attn_kvpacked_func,
    stripe_flash_attn_qkvpacked_func,
)
from ringflash.ring_flash_attn.zigzag_ring_flash_attn import (
    zigzag_ring_flash_attn_func,
    zigzag_ring_flash_attn_kvpacked_func,
    zigzag_ring_flash_attn_qkvpacked_func,
)
from ringflash.ring_flash_attn.zigzag_ring_flash_attn_varlen import (
    zigzag_ring_flash_attn_varlen_func,
    zigzag_ring_flash_attn_varlen_kvpacked_func,
    zigzag_ring_flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "substitute_hf_flash_attn",
    "update_ring_flash_attn_params",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
]
