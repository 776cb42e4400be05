"""Portable Triton kernels, for NVIDIA since Ampere and AMD CDNA: attention (attend), attention to a cache (decode)."""
