"""The visits of ring attention written out in XLA operations: every kind of mask, any length, any precision.

Shape legend: as in `ring_visits`; D head_dim, T keys of a block, R = S / T blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.jax_backend.attention.online import (
    Keys,
    Pulled,
    Queries,
    Running,
    absorb,
    finish,
    gradients,
    nothing_yet,
)
from jaxllm.jax_backend.attention.ring_visits import (
    Ring,
    Step,
    Visits,
    at,
    cut_keys,
    cut_queries,
    cut_segments,
    put,
    uncut_keys,
    uncut_queries,
)
from jaxllm.jax_backend.attention.visibility import Visibility

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 1024
"""Keys of a block: the largest divisor of a chunk in this range, else the whole chunk."""


class BlockMeeting:
    """A `Meeting` whose scores exist for one chunk of queries and one block of keys at a time."""

    def queries(self, query_BSHD: jax.Array, kv_heads: int, visibility: Visibility) -> Queries:
        """Both chunks: (2, B, K, G, C, D)."""
        chunk = query_BSHD.shape[1] // 2
        segments = cut_segments(visibility.query_segments, chunk)
        return Queries(cut_queries(query_BSHD, kv_heads), visibility.query_index.reshape(2, -1), segments)

    def keys(self, key_BSKD: jax.Array, value_BSKD: jax.Array, visibility: Visibility) -> Keys:
        """In blocks: (R, B, K, T, D) each."""
        size = _block(key_BSKD.shape[1] // 2)
        key_RBKTD, value_RBKTD = cut_keys(key_BSKD, size), cut_keys(value_BSKD, size)
        place_RT = visibility.key_index.reshape(-1, size)
        return Keys(key_RBKTD, value_RBKTD, place_RT, cut_segments(visibility.key_segments, size))

    def look(self, ring: Ring, seen: Running | None, queries: Queries, keys: Keys, step: Step) -> Running:
        """One chunk of queries and one block of keys after the other."""

        def one(running: Running, pair: Visits) -> tuple[Running, None]:
            chunk, block = pair
            met = absorb(at(running, chunk), at(queries, chunk), at(keys, block), ring.spec, ring.policy)
            return put(running, chunk, met), None

        start = nothing_yet(queries.query, ring.policy) if seen is None else seen
        return jax.lax.scan(one, start, ring.visits(step, len(keys.key) // 2))[0]

    def output(self, seen: Running) -> tuple[jax.Array, jax.Array]:
        """As in `Meeting`."""
        mixed, log_total = finish(seen)
        return uncut_queries(mixed), uncut_queries(log_total)

    def pulled(self, mixed_BSHD: jax.Array, log_total_BSH: jax.Array, gradient_BSHD: jax.Array, kv_heads: int) -> Pulled:
        """Both chunks."""
        statistics = log_total_BSH.dtype
        delta_BSH = jnp.sum(mixed_BSHD.astype(statistics) * gradient_BSHD.astype(statistics), axis=-1)
        return Pulled(*(cut_queries(leaf, kv_heads) for leaf in (gradient_BSHD, log_total_BSH, delta_BSH)))

    def pull(self, ring: Ring, queries: Queries, keys: Keys, pulled: Pulled, step: Step) -> tuple[Any, Any]:
        """One chunk of queries and one block of keys after the other."""

        def one(sums: tuple[jax.Array, ...], pair: Visits) -> tuple[tuple[jax.Array, ...], None]:
            chunk, block = pair
            added = gradients(at(queries, chunk), at(keys, block), at(pulled, chunk), ring.spec, ring.policy)
            places = (chunk, block, block)
            return tuple(leaf.at[at].add(more) for leaf, at, more in zip(sums, places, added, strict=True)), None

        nothing = tuple(jnp.zeros(leaf.shape, ring.policy.statistics) for leaf in (queries.query, keys.key, keys.value))
        (to_queries, *to_keys), _ = jax.lax.scan(one, nothing, ring.visits(step, len(keys.key) // 2))
        return to_queries, tuple(to_keys)

    def gradients(self, to_queries: jax.Array, to_keys: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As in `Meeting`."""
        to_key, to_value = (uncut_keys(leaf) for leaf in to_keys)
        return uncut_queries(to_queries), to_key, to_value


def _block(chunk: int) -> int:
    """Keys of a block, which divides a chunk."""
    sizes = range(min(chunk, LARGEST_BLOCK), SMALLEST_BLOCK - 1, -1)
    return next((size for size in sizes if chunk % size == 0), chunk)
