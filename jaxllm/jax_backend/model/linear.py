"""Embedding tables and affine maps over any number of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.jax_backend.gathering import gathered, with_gathered
from jaxllm.jax_backend.model.parameter import parameter
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.products import bf16_product


class Linear(nnx.Module):
    """x W + b, contracting the last `inputs` axes of x with the first `inputs` axes of the kernel."""

    def __init__(self, shape: Sequence[int], axes: Sequence[str], bias: bool, runtime: Runtime, inputs: int = 1) -> None:
        self.kernel = parameter(shape, axes, runtime)
        self.bias = parameter(shape[inputs:], axes[inputs:], runtime) if bias else None
        self.axes = tuple(axes)
        self.inputs = inputs
        self.runtime = runtime

    def __call__(self, x: jax.Array) -> jax.Array:
        product = partial(contract, inputs=self.inputs, runtime=self.runtime)
        y = with_gathered(product, x, self.kernel[...], self.axes, self.runtime.layout.mesh)
        return y if self.bias is None else y + self.bias[...]


def contract(x: jax.Array, kernel: jax.Array, inputs: int, runtime: Runtime) -> jax.Array:
    """The last `inputs` axes of x times the first `inputs` axes of the kernel.

    On one device the product is of two matrices.  With more axes the gradient of the kernel would contract over batch and
    sequence, for which XLA on a CPU first writes a transposed copy of all activations.  On several devices batch and sequence
    are cut apart, and joining them would move data.
    """
    if runtime.layout.mesh.size > 1:
        return jnp.tensordot(x, kernel, axes=inputs, precision=runtime.policy.matmul)
    size = math.prod(kernel.shape[:inputs])
    on_cpu = runtime.layout.platform == "cpu"
    product = bf16_product if on_cpu and x.dtype == jnp.bfloat16 else partial(jnp.dot, precision=runtime.policy.matmul)
    y: jax.Array = product(x.reshape(-1, size), kernel.reshape(size, -1))
    return y.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])


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
        product = lambda x_BSE, table: contract(x_BSE, table.T, 1, self.runtime)  # noqa: E731
        return with_gathered(product, x_BSE, self.embedding[...], self.axes, self.runtime.layout.mesh)
