"""Modules for Hugging Face's models. They take a model's config as it comes; nothing here imports Transformers."""

from ringflash.sagemaker.nn.huggingface import llama_flashattn

__all__ = ["llama_flashattn"]
