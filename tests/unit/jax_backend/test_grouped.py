"""Products of groups of rows: the TPU kernel for their kernels' gradient, in Pallas' interpreter, against XLA's path."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.jax_backend.model import grouped

ROWS, FEATURES, OUTPUTS = 512, 160, 1152  # neither side a whole number of tiles
SIZES = {
    "alike": [128, 128, 128, 128],
    "ends within tiles": [5, 251, 0, 256],
    "rows of no group": [0, 130, 1, 60],
    "one has all": [0, 0, ROWS, 0],
    "none has any": [0, 0, 0, 0],
}


def arrays(sizes, dtype):
    random = np.random.default_rng(0)
    rows, gradient = (random.normal(size=(ROWS, size)) for size in (FEATURES, OUTPUTS))
    rows[sum(sizes) :] = np.nan  # what nobody may read
    kernels = random.normal(size=(len(sizes), FEATURES, OUTPUTS))
    return (*(jnp.asarray(each, dtype) for each in (rows, kernels, gradient)), jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradient_of_kernels_is_the_sum_over_each_groups_own_rows(sizes, dtype):
    rows, _, gradient, sizes_X = arrays(sizes, dtype)
    found = grouped.kernels_gradient(rows, gradient, sizes_X, 128, interpret=True)
    ends = np.cumsum([0, *sizes])
    exact_rows, exact_gradient = (np.asarray(each, np.float64) for each in (rows, gradient))
    wanted = np.stack([exact_rows[a:b].T @ exact_gradient[a:b] for a, b in pairwise(ends)])
    assert found.dtype == dtype
    bound = 5e-7 if dtype == jnp.float32 else 2.0**-8  # sums in float32, rounded once
    assert np.max(np.abs(np.asarray(found, np.float64) - wanted)) <= bound * max(np.max(np.abs(wanted)), 1.0)


def test_gradients_are_those_of_xla(monkeypatch):
    """The whole rule, rows' gradient included; on a CPU its kernel is interpreted."""
    rows, kernels, gradient, sizes_X = arrays([100, 0, 300, 112], jnp.float32)
    kernel = grouped.kernels_gradient
    monkeypatch.setattr(grouped, "kernels_gradient", lambda *inputs: kernel(*inputs, interpret=True))

    def pulled(tile):
        dot = lambda rows, kernels: grouped.grouped_dot(rows, kernels, sizes_X, jax.lax.Precision.HIGHEST, tile)  # noqa: E731
        products, pull = jax.vjp(jax.jit(dot), rows, kernels)
        return products, *pull(gradient)

    for found, wanted in zip(pulled(256), pulled(None), strict=True):
        assert float(jnp.max(jnp.abs(found - wanted))) <= 1e-6 * float(jnp.max(jnp.abs(wanted)))


@pytest.mark.parametrize(
    ("rows", "groups", "tile"),
    [(8192, 8, 512), (32768, 128, 128), (2048, 4, 256), (256, 8, 128), (384, 1, 128), (1000, 2, None), (64, 2, None)],
)
def test_tile_divides_rows_and_is_small_beside_groups(rows, groups, tile):
    assert grouped.row_tile(rows, groups) == tile
