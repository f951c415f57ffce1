"""Embedding tables and affine maps over any number of axes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.jax_backend.gathering import gathered
from jaxllm.jax_backend.model.parameter import parameter
from jaxllm.jax_backend.model.runtime import Runtime


class Linear(nnx.Module):
    """x W + b, contracting the last `inputs` axes of x with the first `inputs` axes of the kernel."""

    def __init__(self, shape: Sequence[int], axes: Sequence[str], bias: bool, runtime: Runtime, inputs: int = 1) -> None:
        self.kernel = parameter(shape, axes, runtime)
        self.bias = parameter(shape[inputs:], axes[inputs:], runtime) if bias else None
        self.axes = tuple(axes)
        self.inputs = inputs
        self.runtime = runtime

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = gathered(self.kernel[...], self.axes, self.runtime.layout.mesh)
        y = jnp.tensordot(x, kernel, axes=self.inputs, precision=self.runtime.policy.matmul)
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """A table of vectors: rows are looked up by index, or compared with a vector by `attend` (a tied output head)."""

    def __init__(self, rows: int, size: int, axes: Sequence[str], runtime: Runtime) -> None:
        self.embedding = parameter((rows, size), axes, runtime)
        self.axes = tuple(axes)
        self.runtime = runtime

    def __call__(self, indices: jax.Array) -> jax.Array:
        # Looked up with whole rows: rows that are cut would come out cut along the hidden dimension by devices that should
        # hold other sequences, and the compiler would gather all of them to sort that out.
        table = gathered(self.embedding[...], self.axes, self.runtime.layout.mesh)
        return jnp.take(table, indices, axis=0)

    def attend(self, x_BSE: jax.Array) -> jax.Array:
        """Logits (B, S, rows)."""
        table = gathered(self.embedding[...], self.axes, self.runtime.layout.mesh)
        return jnp.einsum("bse,ve->bsv", x_BSE, table, precision=self.runtime.policy.matmul)
