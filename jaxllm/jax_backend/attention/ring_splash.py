"""The visits of ring attention by splash attention's kernels: one for the keys at home, one for those of each other device.

Tokens at home are in order, so that the home kernel has the mask of a row.  At every other visit whole chunks of queries meet
whole chunks of keys (`Ring.visits`), and no kernel needs to know where in the row they stand.  What the visits give is joined
by the logsumexp of their scores; the backward kernels are handed that of all visits together, so that each gives its part of
the whole gradient.

Shape legend: as in `ring_visits`; D head_dim, W pairs of chunks that meet at a visit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.ring_visits import (
    Ring,
    Step,
    at,
    cut_keys,
    cut_queries,
    cut_segments,
    put,
    uncut_keys,
    uncut_queries,
)
from jaxllm.jax_backend.attention.splash import LANES, Blocks, fitted, kernel_of_group
from jaxllm.jax_backend.attention.visibility import Visibility

TreeT = TypeVar("TreeT")

SEGMENTS_NDIM = 3
"""Axes of segments in chunks, (2, B, C); everything else has more."""


class Part(NamedTuple):
    """Queries or keys with the documents they belong to.

    values: (..., S, D) each, of queries (query,), of keys (key, value).  segments: (..., S), or None: one document.
    """

    values: tuple[jax.Array, ...]
    segments: jax.Array | None


class Mixed(NamedTuple):
    """What queries have seen so far: mixed values (..., S, D) and the logsumexp of the scores (..., S), in float32."""

    values: jax.Array
    log_total: jax.Array


def check_splash_ring(spec: AttentionSpec, chunk: int, itemsize: int) -> None:
    """ConfigError for what these kernels cannot do.  chunk: tokens of half a device's rows.  itemsize: bytes of a number."""
    if spec.window is not None:
        raise ConfigError("jax.attention", "splash knows no window within a ring (parallel.context above 1); use auto")
    if chunk % LANES:
        raise ConfigError(
            "jax.attention",
            f"splash needs chunks of a multiple of {LANES} tokens within a ring, not {chunk}; use auto, or a "
            f"data.sequence_length that 2 * parallel.context * {LANES} divides",
        )
    if itemsize > 4:
        raise ConfigError("jax.attention", "splash computes its softmax in float32; use auto with training.precision fp64")


@dataclass(frozen=True)
class Visit:
    """One kernel for `groups` heads of queries and one of keys, `length` tokens each.  exact: products of float32 as such."""

    groups: int
    length: int
    causal: bool
    softcap: float | None
    blocks: Blocks
    interpret: bool
    exact: bool

    @property
    def _kernel(self) -> kernels.SplashAttentionKernel:
        blocks = fitted(self.blocks, self.length, self.length)
        return kernel_of_group(
            self.groups, self.length, self.length, self.causal, None, self.softcap, blocks, self.interpret, residuals=True
        )

    def forward(self, queries: Part, keys: Part) -> Mixed:
        """What queries (..., B, K, G, S, D) see of keys (..., B, K, S, D)."""
        kernel = self._kernel

        def one(query_GSD: jax.Array, key_SD: jax.Array, value_SD: jax.Array, *ids: jax.Array) -> Mixed:
            found: Any = kernel(query_GSD, key_SD, value_SD, kernels.SegmentIds(*ids) if ids else None)
            mixed_GSD, (log_total_GS,) = found
            return Mixed(mixed_GSD.astype(jnp.float32), log_total_GS)

        mixed: Mixed = self._over_heads(one, (*queries.values, *keys.values), queries, keys)
        return mixed

    def backward(self, queries: Part, keys: Part, mixed: Mixed, gradient: jax.Array) -> tuple[jax.Array, ...]:
        """What this visit adds to the gradients of query, key and value, in float32.

        mixed: of all visits together.  gradient: of the output, (..., B, K, G, S, D).
        """
        kernel = self._kernel
        told = {name: kernel.kwargs[name] for name in ("mask_value", "block_sizes", "mask_function", "attn_logits_soft_cap")}

        def one(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            query_GSD, key_SD, value_SD, mixed_GSD, log_total_GS, gradient_GSD, *ids = arrays
            segments = kernels.SegmentIds(*ids) if ids else None
            # Splash's own rule for gradients has no public name.  It takes output and logsumexp as they are given.
            kept = (query_GSD, key_SD, value_SD, segments, None, mixed_GSD, log_total_GS)
            pulled = kernels._splash_attention_bwd(  # noqa: SLF001
                save_residuals=False,
                is_mqa=True,
                residual_checkpoint_name=None,
                interpret=self.interpret,
                res=(*kept, kernel.dq_mask_info, kernel.dkv_mask_info),
                do=gradient_GSD,
                **told,
            )
            return tuple(leaf.astype(jnp.float32) for leaf in pulled[3:6])

        arrays = (*queries.values, *keys.values, *mixed, gradient)
        pulled: tuple[jax.Array, ...] = self._over_heads(one, arrays, queries, keys)
        return pulled

    def _over_heads(self, one: Callable[..., Any], arrays: tuple[jax.Array, ...], queries: Part, keys: Part) -> Any:
        """`one` of every head of keys, every row, and whatever stands before them."""
        segments = (queries.segments, keys.segments)
        ids = () if None in segments else segments
        mapped = jax.vmap(one, in_axes=(*(0 for _ in arrays), *(None for _ in ids)))
        for _ in range(arrays[0].ndim - 4):
            mapped = jax.vmap(mapped)
        with jax.default_matmul_precision("highest" if self.exact else "default"):
            return mapped(*arrays, *ids)


def joined(first: Mixed, second: Mixed) -> Mixed:
    """What queries see of two sets of keys.  Where a query sees none of one, its logsumexp is so low that it counts nothing."""
    log_total = jnp.logaddexp(first.log_total, second.log_total)
    one, other = (each.values * jnp.exp(each.log_total - log_total)[..., None] for each in (first, second))
    return Mixed(one + other, log_total)


@dataclass(frozen=True)
class SplashMeeting:
    """A `Meeting` of kernels.  Queries and keys are in chunks, (2, B, K, G, C, D) and (2, B, K, C, D)."""

    blocks: Blocks
    interpret: bool

    def queries(self, query_BSHD: jax.Array, kv_heads: int, visibility: Visibility) -> Part:
        """As in `Meeting`."""
        segments = cut_segments(visibility.query_segments, query_BSHD.shape[1] // 2)
        return Part((cut_queries(query_BSHD, kv_heads),), segments)

    def keys(self, key_BSKD: jax.Array, value_BSKD: jax.Array, visibility: Visibility) -> Part:
        """As in `Meeting`."""
        chunk = key_BSKD.shape[1] // 2
        return Part((cut_keys(key_BSKD, chunk), cut_keys(value_BSKD, chunk)), cut_segments(visibility.key_segments, chunk))

    def look(self, ring: Ring, seen: Mixed | None, queries: Part, keys: Part, step: Step) -> Mixed:
        """At home all queries at all keys; later the pairs of chunks that meet."""
        if seen is None:
            return _halves(self._home(ring, queries).forward(_whole(queries, 3), _whole(keys, 2)), 3)
        places, key_places = ring.visits(step, 1)
        met = self._away(ring, queries).forward(_pick(queries, places), _pick(keys, key_places))
        for pair in range(places.size):
            place, part = places[pair], jax.tree.map(lambda leaf, pair=pair: leaf[pair], met)
            seen = put(seen, place, joined(at(seen, place), part))
        return seen

    def output(self, seen: Mixed) -> tuple[jax.Array, jax.Array]:
        """As in `Meeting`."""
        return uncut_queries(seen.values), uncut_queries(seen.log_total)

    def pulled(
        self, mixed_BSHD: jax.Array, log_total_BSH: jax.Array, gradient_BSHD: jax.Array, kv_heads: int
    ) -> tuple[Mixed, jax.Array]:
        """Output and its gradient, in chunks."""
        mixed = Mixed(cut_queries(mixed_BSHD, kv_heads), cut_queries(log_total_BSH, kv_heads))
        return mixed, cut_queries(gradient_BSHD, kv_heads)

    def pull(
        self, ring: Ring, queries: Part, keys: Part, pulled: tuple[Mixed, jax.Array], step: Step
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """As `look`."""
        if isinstance(step, int):
            mixed, gradient = _whole(pulled, 3)
            home = self._home(ring, queries).backward(_whole(queries, 3), _whole(keys, 2), mixed, gradient)
            return _halves(home[0], 3), tuple(_halves(leaf, 2) for leaf in home[1:])
        places, key_places = ring.visits(step, 1)
        mixed, gradient = _pick(pulled, places)
        added = self._away(ring, queries).backward(_pick(queries, places), _pick(keys, key_places), mixed, gradient)
        sums = [jnp.zeros(leaf.shape, jnp.float32) for leaf in (*queries.values, *keys.values)]
        for pair in range(places.size):
            for i, place in enumerate((places[pair], key_places[pair], key_places[pair])):
                sums[i] = put(sums[i], place, at(sums[i], place) + added[i][pair])
        return sums[0], tuple(sums[1:])

    def gradients(self, to_queries: jax.Array, to_keys: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As in `Meeting`."""
        to_key, to_value = (uncut_keys(leaf) for leaf in to_keys)
        return uncut_queries(to_queries), to_key, to_value

    def _home(self, ring: Ring, queries: Part) -> Visit:
        groups, chunk = queries.values[0].shape[3:5]
        return self._visit(ring, groups, 2 * chunk, ring.spec.causal)

    def _away(self, ring: Ring, queries: Part) -> Visit:
        groups, chunk = queries.values[0].shape[3:5]
        return self._visit(ring, groups, chunk, False)

    def _visit(self, ring: Ring, groups: int, length: int, causal: bool) -> Visit:
        exact = ring.policy.compute == jnp.float32
        return Visit(groups, length, causal, ring.spec.softcap, self.blocks, self.interpret, exact)


def _pick(tree: TreeT, places: jax.Array) -> TreeT:
    """The chunks at `places`, (W, ...)."""
    picked: TreeT = jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0), tree)
    return picked


def _whole(tree: TreeT, before: int) -> TreeT:
    """Chunks (2, ..., C, ...) side by side, (..., S, ...).  before: axes of the result before the tokens; of segments one."""

    def join(leaf: jax.Array) -> jax.Array:
        place = 1 if leaf.ndim == SEGMENTS_NDIM else before
        moved = jnp.moveaxis(leaf, 0, place)
        return moved.reshape(*moved.shape[:place], -1, *moved.shape[place + 2 :])

    whole: TreeT = jax.tree.map(join, tree)
    return whole


def _halves(tree: TreeT, before: int) -> TreeT:
    """The inverse of `_whole`."""

    def cut(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf.reshape(*leaf.shape[:before], 2, -1, *leaf.shape[before + 1 :]), before, 0)

    halves: TreeT = jax.tree.map(cut, tree)
    return halves
