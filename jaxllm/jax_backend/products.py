"""Products of two matrices, written so that XLA on a CPU takes its fastest kernels for them.

Those kernels (YNNPACK's) want the left matrix contracted along its last axis, both matrices row after row in memory, and for
bfloat16 sums in float32.  Anything else is left to another library (Eigen), which has no use for a processor's own bfloat16
instructions: both matrices are converted to float32 first.  In float32 either may be faster (benchmarks/LOG.md).

Shape legend: M rows of the left matrix, K contracted, N columns of the right one.
"""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.jax_backend.precision import Policy, policy_of


def product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, policy: Policy) -> jax.Array:
    """Two matrices of the compute dtype, contracted along an axis of each: (M, N) sums in the statistics dtype.

    left: (M, K), or (K, M) with `left_axis` 0.  right: (K, N), or (N, K) with `right_axis` 1.
    """
    axes = (((left_axis,), (right_axis,)), ((), ()))
    sums: jax.Array = jax.lax.dot_general(left, right, axes, precision=policy.matmul, preferred_element_type=policy.statistics)
    return sums


def transposed(x: jax.Array) -> jax.Array:
    """The transpose (K, M) of a matrix (M, K), written out, in its dtype.

    XLA else makes a transposition part of the product that reads it, which is then none for the fast kernels.
    """
    return _by_rows(x.T)


def transposed_sums(x: jax.Array) -> jax.Array:
    """The transpose (N, M) of what `product` gave, (M, N).

    XLA else turns the product round, and then has no kernel for a product of bfloat16 with sums in float32.
    """
    return _by_rows(x).T


def _by_rows(x: jax.Array) -> jax.Array:
    written: jax.Array = with_layout_constraint(x, Layout(major_to_minor=(0, 1)))
    return written


@jax.custom_vjp
def bf16_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product (M, N) of x (M, K) and y (K, N), all bfloat16: float32 sums, rounded once; its gradients likewise."""
    return _rounded(x, y, 1, 0)


def _rounded(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return product(x, y, x_axis, y_axis, policy_of("bf16")).astype(x.dtype)


def _gradients(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = kept
    return _rounded(gradient, y, 1, 1), _rounded(transposed(x), gradient, 1, 0)


bf16_product.defvjp(lambda x, y: (bf16_product(x, y), (x, y)), _gradients)
