"""Softmax over keys that come block by block (Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).

Forward and backward of one query block against one key block; nothing of queries x all keys ever exists.

Shape legend: B batch, K key/value heads, G queries heads per key/value head, S queries, T keys, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility, visible
from jaxllm.jax_backend.precision import Policy


class Queries(NamedTuple):
    """A block of queries with what decides their visibility: query_BKGSD, place_S, segments_BS (None: one document)."""

    query: jax.Array
    place: jax.Array
    segments: jax.Array | None


class Keys(NamedTuple):
    """A block of keys and values, (B, K, T, D) each, with what decides their visibility."""

    key: jax.Array
    value: jax.Array
    place: jax.Array
    segments: jax.Array | None


class Running(NamedTuple):
    """A softmax so far, in the statistics dtype.

    largest_BKGS: the highest score.  total_BKGS: sum of exp(score - largest).  mixed_BKGSD: the same sum over values.
    """

    largest: jax.Array
    total: jax.Array
    mixed: jax.Array


class Pulled(NamedTuple):
    """What the backward pass of a block needs besides its inputs.

    output_gradient_BKGSD in the compute dtype; log_total_BKGS: logsumexp of all scores of a query; delta_BKGS: output times its
    gradient, summed over D.
    """

    output_gradient: jax.Array
    log_total: jax.Array
    delta: jax.Array


def nothing_yet(query: jax.Array, policy: Policy) -> Running:
    """The softmax over no keys, of queries (..., S, D).

    The highest score starts at a finite lowest, as masked scores do: what a block without a visible key adds is multiplied by
    exp(lowest - largest) = 0 as soon as a visible one comes, and every query sees itself.
    """
    statistics = policy.statistics
    lowest = jnp.full(query.shape[:-1], np.finfo(statistics).min, statistics)
    return Running(lowest, jnp.zeros_like(lowest), jnp.zeros(query.shape, statistics))


def absorb(running: Running, queries: Queries, keys: Keys, spec: AttentionSpec, policy: Policy) -> Running:
    """The softmax over the keys so far and those of `keys`."""
    scores_BKGST, _ = _scores(queries, keys, spec, policy)
    largest = jnp.maximum(running.largest, jnp.max(scores_BKGST, axis=-1))
    weights_BKGST = jnp.exp(scores_BKGST - largest[..., None])
    shrink = jnp.exp(running.largest - largest)
    mixed = _product("bkgst,bktd->bkgsd", weights_BKGST, keys.value, policy)
    total = running.total * shrink + jnp.sum(weights_BKGST, axis=-1)
    return Running(largest, total, running.mixed * shrink[..., None] + mixed)


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """The output (B, K, G, S, D) and the logsumexp of the scores (B, K, G, S), in the statistics dtype."""
    return running.mixed / running.total[..., None], running.largest + jnp.log(running.total)


def gradients(
    queries: Queries, keys: Keys, pulled: Pulled, spec: AttentionSpec, policy: Policy
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one block adds to the gradients of query, key and value, in the statistics dtype.

    With p = exp(s - logsumexp) and o = p v: dv = p^T do, ds = p (do v^T - delta), dq = ds k, dk = ds^T q (arXiv:2205.14135,
    appendix B.2).
    """
    scores_BKGST, slope_BKGST = _scores(queries, keys, spec, policy)
    weights_BKGST = jnp.exp(scores_BKGST - pulled.log_total[..., None])
    value_gradient = _product("bkgst,bkgsd->bktd", weights_BKGST, pulled.output_gradient, policy)
    weight_gradient_BKGST = _product("bkgsd,bktd->bkgst", pulled.output_gradient, keys.value, policy)
    score_gradient_BKGST = weights_BKGST * (weight_gradient_BKGST - pulled.delta[..., None]) * spec.scale
    if slope_BKGST is not None:
        score_gradient_BKGST = score_gradient_BKGST * slope_BKGST
    query_gradient = _product("bkgst,bktd->bkgsd", score_gradient_BKGST, keys.key, policy)
    key_gradient = _product("bkgst,bkgsd->bktd", score_gradient_BKGST, queries.query, policy)
    return query_gradient, key_gradient, value_gradient


def _product(pattern: str, left: jax.Array, right: jax.Array, policy: Policy) -> jax.Array:
    """A product of matrices in the compute dtype, summed in the statistics dtype."""
    return jnp.einsum(
        pattern,
        left.astype(policy.compute),
        right,
        precision=policy.matmul,
        preferred_element_type=policy.statistics,
    )


def _scores(queries: Queries, keys: Keys, spec: AttentionSpec, policy: Policy) -> tuple[jax.Array, jax.Array | None]:
    """Scores (B, K, G, S, T), lowest where a key is not seen; and the slope of the soft cap at them, if there is one."""
    scores_BKGST = spec.scale * _product("bkgsd,bktd->bkgst", queries.query, keys.key, policy)
    slope_BKGST = None
    if spec.softcap is not None:
        bent_BKGST = jnp.tanh(scores_BKGST / spec.softcap)
        scores_BKGST, slope_BKGST = bent_BKGST * spec.softcap, 1.0 - bent_BKGST * bent_BKGST
    seen = visible(Visibility(queries.place, keys.place, queries.segments, keys.segments), spec)
    return jnp.where(seen[:, None, None], scores_BKGST, np.finfo(policy.statistics).min), slope_BKGST
