"""jaxllm: one run file trains a language model under JAX or under PyTorch + DeepSpeed, with proof that both agree."""

__version__ = "0.1.0"
