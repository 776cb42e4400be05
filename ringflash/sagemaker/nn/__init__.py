"""The modules of `torch.sagemaker.nn` that attend."""

from ringflash.sagemaker.nn import attn, huggingface

__all__ = ["attn", "huggingface"]
