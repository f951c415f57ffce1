"""Rotary position embedding (arXiv:2104.09864), half-split layout, with the roundings of transformers' LlamaRotaryEmbedding.

Shape legend: B batch, S sequence, N heads, D head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxllm.families.spec import RopeSpec
from jaxllm.jax_backend.precision import Policy


def inverse_frequencies(spec: RopeSpec, head_dim: int, dtype: np.dtype) -> NDArray[np.floating]:
    """(D/2,) angles per position, computed on the host.

    Every operation is rounded to `dtype` once, also the power, which float32 library functions round differently: an error
    of one unit in the last place grows with the position.
    """
    exponents = np.arange(0, head_dim, 2).astype(dtype) / np.asarray(head_dim, dtype)
    powers = np.power(np.float64(spec.theta), exponents.astype(np.float64)).astype(dtype)
    return np.asarray(np.asarray(1.0, dtype) / powers)


def rotary_tables(spec: RopeSpec, head_dim: int, positions_BS: jax.Array, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine (B, S, 1, D) in the compute dtype, for one forward pass of all layers."""
    frequencies = jnp.asarray(inverse_frequencies(spec, head_dim, policy.statistics))
    angles = positions_BS[:, :, None, None].astype(policy.statistics) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(policy.compute), jnp.sin(angles).astype(policy.compute)


def rotate(x_BSND: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair (i, i + D/2) of every head by its position's angle."""
    cosine, sine = rotary
    first, second = jnp.split(x_BSND, 2, axis=-1)
    return x_BSND * cosine + jnp.concatenate([-second, first], axis=-1) * sine
