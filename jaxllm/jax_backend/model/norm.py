"""Normalisation over the hidden dimension, or over the dimensions of a head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.spec import NormSpec
from jaxllm.jax_backend.model.parameter import parameter
from jaxllm.jax_backend.model.runtime import Runtime


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm with bias (arXiv:1607.06450), statistics in the statistics dtype.

    It normalises over the last axes, as many as `shape` has.  The variance is the mean of squared deviations, not
    E[x^2] - E[x]^2, which cancels.  Where it rounds to the compute dtype, `NormSpec.rounds_late` says.
    """

    def __init__(self, spec: NormSpec, shape: Sequence[int], axes: Sequence[str], runtime: Runtime) -> None:
        self.scale = parameter(shape, axes, runtime)
        self.bias = parameter(shape, axes, runtime) if spec.kind == "layer" else None
        self.spec = spec
        self.over = tuple(range(-len(shape), 0))
        self.policy = runtime.policy

    def __call__(self, x: jax.Array) -> jax.Array:
        spec, scale = self.spec, self.scale[...]
        if spec.unit_offset:
            scale = 1.0 + scale.astype(self.policy.statistics)
        x = x.astype(self.policy.statistics)
        if self.bias is not None:
            x = x - jnp.mean(x, axis=self.over, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=self.over, keepdims=True) + spec.eps)
        if self.bias is not None:
            return (x * scale + self.bias[...]).astype(self.policy.compute)
        return (x * scale).astype(self.policy.compute) if spec.rounds_late else scale * x.astype(self.policy.compute)
