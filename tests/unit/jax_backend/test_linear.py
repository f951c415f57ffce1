"""Products in bfloat16 on a CPU: float32 sums, rounded once, and the gradients of a product."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.model.linear import contract
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout


def test_bf16_products_are_rounded_once():
    runtime = Runtime(policy_of("bf16"), Layout(single_device_mesh()))
    generator = np.random.default_rng(0)
    x, kernel, gradient = (
        jnp.asarray(generator.standard_normal(shape), jnp.bfloat16) for shape in ((2, 24, 40), (40, 4, 8), (2, 24, 4, 8))
    )
    y, pull = jax.vjp(lambda x, kernel: contract(x, kernel, 1, runtime), x, kernel)
    wide_x, wide_kernel, wide_gradient = (np.asarray(each, np.float64) for each in (x, kernel, gradient))
    exact = (
        np.einsum("bse,ehd->bshd", wide_x, wide_kernel),
        np.einsum("bshd,ehd->bse", wide_gradient, wide_kernel),
        np.einsum("bse,bshd->ehd", wide_x, wide_gradient),
    )
    for found, wanted in zip((y, *pull(gradient)), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        # Half of the last of 8 bits, and what float32 sums leave where they cancel.
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=1e-5)
