"""Continuing a text with a trained model: sampling on the host, the same on either backend."""

from jaxllm.generation.generate import generate, prompt_tokens
from jaxllm.generation.sampling import Sampling, sample

__all__ = ["Sampling", "generate", "prompt_tokens", "sample"]
