"""Attention on a CPU: blocks of scores that stay in its cache, and none that a causal mask or a window hides altogether.

One key/value head of one row at a time, so that every product is of two plain matrices; queries in blocks, each against all the
keys it may see.  The backward pass computes the scores again from the logsumexp of each query (Dao et al., arXiv:2205.14135),
so that nothing of queries x keys is kept, either.

Shape legend: B batch, S tokens, H heads, K key/value heads, G = H / K queries per key, D head_dim, R = G * queries of a block,
T keys of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility, visible
from jaxllm.jax_backend.attention.xla import xla_attention
from jaxllm.jax_backend.precision import Policy
from jaxllm.jax_backend.remat import ATTENTION_MIXED, named

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime

SMALLEST_BLOCK, MOST_BLOCKS = 64, 16
"""Queries of a block: few, so that its scores stay in the cache; but blocks are unrolled, and many take long to compile."""


class Head(NamedTuple):
    """One key/value head of one row: query_GSD, key_SD, value_SD, segments_S."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    segments: jax.Array


class _Block(NamedTuple):
    """Queries [start, stop) and the keys [first, last) that any of them may see."""

    start: int
    stop: int
    first: int
    last: int


def blocked_attention(
    query_BSHD: jax.Array,
    key_BTKD: jax.Array,
    value_BTKD: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """As `AttentionKernel`; self-attention over whole rows, each device on its own rows and heads.

    What is not that (a few queries over a cache), and dropout of the weights, is left to `xla_attention`.
    """
    if (
        visibility.query_segments is None
        or query_BSHD.shape[1] != key_BTKD.shape[1]
        or (dropout_key is not None and spec.dropout)
    ):
        return xla_attention(query_BSHD, key_BTKD, value_BTKD, visibility, spec, runtime, dropout_key)
    layout = runtime.layout
    by_head, by_kv_head = layout.spec("batch", None, "heads", None), layout.spec("batch", None, "kv_heads", None)
    local = partial(_local, spec=spec, policy=runtime.policy)
    if layout.mesh.size > 1:
        in_specs = (by_head, by_kv_head, by_kv_head, layout.spec("batch", None))
        local = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=by_head, check_vma=False)
    return local(query_BSHD, key_BTKD, value_BTKD, visibility.query_segments)


def _local(
    query_BSHD: jax.Array,
    key_BSKD: jax.Array,
    value_BSKD: jax.Array,
    segments_BS: jax.Array,
    *,
    spec: AttentionSpec,
    policy: Policy,
) -> jax.Array:
    batch, length, heads, head_dim = query_BSHD.shape
    kv_heads = key_BSKD.shape[2]
    query_BKGSD = query_BSHD.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    by_head: Callable[[jax.Array], jax.Array] = lambda x: x.transpose(0, 2, 1, 3).reshape(-1, length, head_dim)  # noqa: E731
    mixed = _attention(
        Head(
            query_BKGSD.reshape(batch * kv_heads, -1, length, head_dim),
            by_head(key_BSKD),
            by_head(value_BSKD),
            jnp.repeat(segments_BS, kv_heads, axis=0),
        ),
        spec,
        policy,
    )
    mixed_BKGSD = mixed.reshape(batch, kv_heads, -1, length, head_dim)
    return mixed_BKGSD.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(heads: Head, spec: AttentionSpec, policy: Policy) -> jax.Array:
    """(B * K, G, S, D) of heads with a leading axis of B * K."""
    return _forward(heads, spec, policy)[0]


def _forward(heads: Head, spec: AttentionSpec, policy: Policy) -> tuple[jax.Array, tuple[Head, jax.Array, jax.Array]]:
    found = jax.lax.map(partial(_mix, spec=spec, policy=policy), heads)
    mixed, log_total = (named(leaf, ATTENTION_MIXED) for leaf in found)
    return mixed, (heads, mixed, log_total)


def _backward(spec: AttentionSpec, policy: Policy, kept: tuple[Head, jax.Array, jax.Array], gradient: jax.Array) -> tuple[Head]:
    back = partial(_pull, spec=spec, policy=policy)
    query, key, value = jax.lax.map(lambda inputs: back(*inputs), (*kept, gradient))
    return (Head(query, key, value, np.zeros(kept[0].segments.shape, jax.dtypes.float0)),)  # type: ignore[arg-type]


_attention.defvjp(_forward, _backward)


def _mix(head: Head, *, spec: AttentionSpec, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """The weighted values (G, S, D) in the compute dtype and the logsumexp of the scores (G, S) in the statistics dtype."""
    groups, length, head_dim = head.query.shape
    mixed, log_total = [], []
    for block in _blocks(length, spec):
        scores_RT = _scores(head, block, spec, policy)[0]
        largest_R1 = jnp.max(scores_RT, axis=-1, keepdims=True)
        weights_RT = jnp.exp(scores_RT - largest_R1)
        total_R1 = jnp.sum(weights_RT, axis=-1, keepdims=True)
        mixed_RD = _product(weights_RT.astype(policy.compute), head.value[block.first : block.last], 0, policy) / total_R1
        mixed.append(mixed_RD.astype(policy.compute).reshape(groups, -1, head_dim))
        log_total.append((largest_R1 + jnp.log(total_R1)).reshape(groups, -1))
    return jnp.concatenate(mixed, axis=1), jnp.concatenate(log_total, axis=1)


def _pull(
    head: Head, mixed_GSD: jax.Array, log_total_GS: jax.Array, gradient_GSD: jax.Array, *, spec: AttentionSpec, policy: Policy
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query (G, S, D), key and value (S, D); formulas of arXiv:2205.14135, appendix B."""
    groups, length, head_dim = head.query.shape
    statistics = policy.statistics
    delta_GS = jnp.sum(gradient_GSD.astype(statistics) * mixed_GSD.astype(statistics), axis=-1)
    query_gradients = []
    key_gradient, value_gradient = jnp.zeros(head.key.shape, statistics), jnp.zeros(head.value.shape, statistics)
    for block in _blocks(length, spec):
        keys = slice(block.first, block.last)
        scores_RT, slope_RT = _scores(head, block, spec, policy)
        weights_RT = jnp.exp(scores_RT - _rows(log_total_GS[..., None], block))
        gradient_RD = _rows(gradient_GSD, block)
        pulled_RT = _product(gradient_RD, head.value[keys], 1, policy) - _rows(delta_GS[..., None], block)
        pulled_RT = weights_RT * pulled_RT * slope_RT if slope_RT is not None else weights_RT * pulled_RT
        pulled_RT = (pulled_RT * spec.scale).astype(policy.compute)
        query_gradients.append(_product(pulled_RT, head.key[keys], 0, policy).reshape(groups, -1, head_dim))
        key_gradient = key_gradient.at[keys].add(_product(pulled_RT, _rows(head.query, block), 0, policy, rows=0))
        value_gradient = value_gradient.at[keys].add(
            _product(weights_RT.astype(policy.compute), gradient_RD, 0, policy, rows=0)
        )
    query_gradient = jnp.concatenate(query_gradients, axis=1)
    return tuple(gradient.astype(policy.compute) for gradient in (query_gradient, key_gradient, value_gradient))  # type: ignore[return-value]


def _blocks(length: int, spec: AttentionSpec) -> Iterator[_Block]:
    size = max(SMALLEST_BLOCK, -(-length // (MOST_BLOCKS * SMALLEST_BLOCK)) * SMALLEST_BLOCK)
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if spec.window is None else max(0, start - spec.window + 1)
        yield _Block(start, stop, first, stop if spec.causal else length)


def _rows(x_GSD: jax.Array, block: _Block) -> jax.Array:
    """The queries of a block of all groups, (R, D)."""
    return x_GSD[:, block.start : block.stop].reshape(-1, x_GSD.shape[-1])


def _scores(head: Head, block: _Block, spec: AttentionSpec, policy: Policy) -> tuple[jax.Array, jax.Array | None]:
    """Scores (R, T) in the statistics dtype, masked; and the slope of their soft cap, if there is one."""
    scores_RT = _product(_rows(head.query, block), head.key[block.first : block.last], 1, policy) * spec.scale
    slope_RT = None
    if spec.softcap is not None:
        capped_RT = jnp.tanh(scores_RT / spec.softcap)
        scores_RT, slope_RT = capped_RT * spec.softcap, 1 - capped_RT * capped_RT
    queries, keys = slice(block.start, block.stop), slice(block.first, block.last)
    index_S = jnp.arange(head.segments.shape[0], dtype=jnp.int32)
    described = Visibility(index_S[queries], index_S[keys], head.segments[None, queries], head.segments[None, keys])
    seen_1ST = visible(described, spec)
    shape = (-1, *seen_1ST.shape[1:])
    masked = jnp.where(seen_1ST, scores_RT.reshape(shape), np.finfo(policy.statistics).min)
    return masked.reshape(scores_RT.shape), slope_RT


def _product(x: jax.Array, y: jax.Array, contracted: int, policy: Policy, rows: int = 1) -> jax.Array:
    """X y over axis `rows` of x and axis `contracted` of y, in the statistics dtype."""
    dimensions: Any = (((rows,), (contracted,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=policy.matmul, preferred_element_type=policy.statistics)
