"""Normalisation over the hidden dimension E."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.spec import NormSpec
from jaxllm.jax_backend.model.parameter import parameter
from jaxllm.jax_backend.model.runtime import Runtime


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm with bias (arXiv:1607.06450), statistics in the statistics dtype.

    The variance is the mean of squared deviations, not E[x^2] - E[x]^2, which cancels.  RMSNorm rounds to the compute dtype
    before it multiplies by the scale, LayerNorm after, as transformers' Llama and torch's layer_norm do.
    """

    def __init__(self, spec: NormSpec, size: int, runtime: Runtime) -> None:
        self.scale = parameter((size,), ("embed",), runtime)
        self.bias = parameter((size,), ("embed",), runtime) if spec.kind == "layer" else None
        self.eps = spec.eps
        self.policy = runtime.policy

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        x = x_BSE.astype(self.policy.statistics)
        if self.bias is None:
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
            return self.scale[...] * x.astype(self.policy.compute)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...] + self.bias[...]).astype(self.policy.compute)
