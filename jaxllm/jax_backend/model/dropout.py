"""Dropout (Srivastava et al., 2014), the same on every mesh: bits depend on the key and the element's global index alone."""

from __future__ import annotations

from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np


class Site(IntEnum):
    """Where in a layer (or beside the layers) a mask is drawn; each site has its own bits."""

    EMBEDDING = 0
    ATTENTION = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3
    HEAD = 4
    HEAD_DENSE = 5
    MLP_INNER = 6
    CROSS_ATTENTION = 7
    CROSS_ATTENTION_OUTPUT = 8
    FINAL = 9


def step_key(seed: int, step: jax.Array, micro_batch: jax.Array) -> jax.Array:
    """The key of one micro-batch of one step; layers fold their index in."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), micro_batch)


def dropout(x: jax.Array, rate: float, key: jax.Array | None, site: Site) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate); nothing without a key."""
    if key is None or rate == 0.0:
        return x
    return _drop(x, rate, jax.random.bits(jax.random.fold_in(key, int(site)), x.shape, jnp.uint32))


def token_dropout(x_BSE: jax.Array, rate: float, key: jax.Array | None, site: Site, index_S: jax.Array) -> jax.Array:
    """`dropout` whose bits belong to the tokens of a row, wherever they stand.  index: the token at each place."""
    if key is None or rate == 0.0:
        return x_BSE
    batch, _, hidden = x_BSE.shape
    keys_S = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, int(site)), index_S)
    bits = jax.vmap(lambda one: jax.random.bits(one, (batch, hidden), jnp.uint32), out_axes=1)(keys_S)
    return _drop(x_BSE, rate, bits)


def _drop(x: jax.Array, rate: float, bits: jax.Array) -> jax.Array:
    keep = bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
