"""Rotary position embedding (arXiv:2104.09864), half-split layout, with the roundings of transformers' LlamaRotaryEmbedding.

Shape legend: B batch, S sequence, N heads, D head_dim, R rotated dimensions of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.families.rope import RopeSpec, inverse_frequencies
from jaxllm.jax_backend.precision import Policy

Tables = tuple[jax.Array, jax.Array]


def rotary_tables(spec: RopeSpec, head_dim: int, positions_BS: jax.Array, length: int, policy: Policy) -> Tables:
    """Cosine and sine (B, S, 1, R) in the compute dtype, for one forward pass of all layers.  length: as in the frequencies."""
    frequencies = jnp.asarray(inverse_frequencies(spec, head_dim, length, policy.statistics))
    angles = positions_BS[:, :, None, None].astype(policy.statistics) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    if spec.attention_factor != 1.0:
        cosine, sine = cosine * spec.attention_factor, sine * spec.attention_factor
    return cosine.astype(policy.compute), sine.astype(policy.compute)


def rotate(x_BSND: jax.Array, rotary: Tables) -> jax.Array:
    """Rotate each pair (i, i + R/2) of every head by its position's angle; dimensions from R on stay."""
    cosine, sine = rotary
    rotated, rest = jnp.split(x_BSND, [cosine.shape[-1]], axis=-1)
    first, second = jnp.split(rotated, 2, axis=-1)
    rotated = rotated * cosine + jnp.concatenate([-second, first], axis=-1) * sine
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
