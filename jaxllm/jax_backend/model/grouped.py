"""Products of rows with the kernel of the group that each row belongs to, and their gradients.

`jax.lax.ragged_dot` is the product.  XLA has a TPU kernel for it and for the gradient of its rows, but none for the gradient of
its kernels: it multiplies every row with every group, with zeros for other groups' rows, X times the work.  There the gradient
is JAX's Pallas kernel for it (megablox, `tgmm`), which sums the products of each group's own rows in float32.

Shape legend: A rows, sorted by group, K and N features, X groups.  Rows behind the last group belong to none.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

ROW_TILES = (512, 256, 128)
"""Rows that a step of the gradient's kernel takes, best first.  A tile where groups meet is computed for each of them."""

FEATURE_TILE = 1024
"""Features of either side that a step takes at most."""


def row_tile(rows: int, groups: int) -> int | None:
    """The largest tile that divides `rows` and of which groups' ends make at most half as many again; else the smallest.

    None when no tile divides them.  groups: among how many the rows are divided.
    """
    fitting = [tile for tile in ROW_TILES if rows % tile == 0]
    return next((tile for tile in fitting if 2 * tile * groups <= rows), fitting[-1] if fitting else None)


def grouped_dot(
    rows_AK: jax.Array, kernels_XKN: jax.Array, sizes_X: jax.Array, precision: jax.lax.Precision, tile: int | None = None
) -> jax.Array:
    """(A, N): each row times its group's kernel; rows of no group have no result that means anything.

    sizes_X: rows of each group.  tile: rows of a tile, to take the Pallas kernel for the gradient of the kernels; None: XLA's.
    """
    if tile is None:
        return jax.lax.ragged_dot(rows_AK, kernels_XKN, sizes_X, precision=precision)
    return _with_kernel(rows_AK, kernels_XKN, sizes_X, precision, tile)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_kernel(
    rows_AK: jax.Array, kernels_XKN: jax.Array, sizes_X: jax.Array, precision: jax.lax.Precision, tile: int
) -> jax.Array:
    del tile
    return jax.lax.ragged_dot(rows_AK, kernels_XKN, sizes_X, precision=precision)


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _forward(
    rows_AK: jax.Array, kernels_XKN: jax.Array, sizes_X: jax.Array, precision: jax.lax.Precision, tile: int
) -> tuple[jax.Array, _Saved]:
    return _with_kernel(rows_AK, kernels_XKN, sizes_X, precision, tile), (rows_AK, kernels_XKN, sizes_X)


def _backward(
    precision: jax.lax.Precision, tile: int, saved: _Saved, gradient_AN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_AK, kernels_XKN, sizes_X = saved
    _, pull = jax.vjp(lambda rows: jax.lax.ragged_dot(rows, kernels_XKN, sizes_X, precision=precision), rows_AK)
    return *pull(gradient_AN), kernels_gradient(rows_AK, gradient_AN, sizes_X, tile), None


_with_kernel.defvjp(_forward, _backward)


def kernels_gradient(
    rows_AK: jax.Array, gradient_AN: jax.Array, sizes_X: jax.Array, tile: int, *, interpret: bool = False
) -> jax.Array:
    """(X, K, N), in the rows' dtype: the sum over each group's rows of row times gradient.

    interpret: in Pallas' interpreter, which needs no TPU and is slow: good for tests of its numbers.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # only where it is used: Pallas takes its time to import

    tiles = (tile, min(rows_AK.shape[1], FEATURE_TILE), min(gradient_AN.shape[1], FEATURE_TILE))
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):  # its counts are of 32 bits
        found: jax.Array = tgmm(
            rows_AK.swapaxes(0, 1), gradient_AN, sizes_X.astype(jnp.int32), rows_AK.dtype, tiles, interpret=interpret
        )
    return found
