"""Attention on a CPU: blocks of scores that stay in its cache, and none that a causal mask or a window hides altogether.

One key/value head of one row at a time, so that every product is of two plain matrices; queries in blocks, each against all the
keys it may see.  The backward pass computes the scores again from the logsumexp of each query (Dao et al., arXiv:2205.14135),
so that nothing of queries x keys is kept, either.

Shape legend: B batch, S tokens, H heads, K key/value heads, G = H / K queries per key, D head_dim, R = G * queries of a block,
T keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial, reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility, visible
from jaxllm.jax_backend.attention.xla import xla_attention
from jaxllm.jax_backend.precision import Policy
from jaxllm.jax_backend.products import product, transposed, transposed_sums
from jaxllm.jax_backend.remat import ATTENTION_MIXED, named

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime

SMALLEST_BLOCK, MOST_BLOCKS = 64, 16
"""Queries of a block: few, so that its scores stay in the cache; but blocks are unrolled, and many take long to compile."""

ENOUGH_ROWS, FEW_BLOCKS = 256, 8
"""Rows of scores at which a product no longer gains from more; and into how many blocks a row of tokens is cut all the same."""

MOST_KEYS = 1024
"""Keys of one product, so that its scores are still in the cache when they are read."""

MOST_SCORES = 2**21
"""Of blocks that are worked on at once (8 MiB in float32, several times over)."""


class Head(NamedTuple):
    """One key/value head of one row: query_GSD, key_SD, value_SD, segments_S."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    segments: jax.Array


class _Keys(NamedTuple):
    """Keys [first, last).  cut: whether some query of a block cannot see some of them, because of where they are."""

    first: int
    last: int
    cut: bool


class _Block(NamedTuple):
    """Queries [start, stop) and, in pieces, the keys that any of them may see.

    Only the pieces at both ends are compared with the places of queries; and each piece is its own product, so that its scores
    are not copied to be put beside others.
    """

    start: int
    stop: int
    keys: tuple[_Keys, ...]


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
    found = _for_each(partial(_mix, spec=spec, policy=policy), heads)
    mixed, log_total = (named(leaf, ATTENTION_MIXED) for leaf in found)
    return mixed, (heads, mixed, log_total)


def _backward(spec: AttentionSpec, policy: Policy, kept: tuple[Head, jax.Array, jax.Array], gradient: jax.Array) -> tuple[Head]:
    back = partial(_pull, spec=spec, policy=policy)
    query, key, value = _for_each(lambda inputs: back(*inputs), (*kept, gradient))
    return (Head(query, key, value, np.zeros(kept[0].segments.shape, jax.dtypes.float0)),)  # type: ignore[arg-type]


_attention.defvjp(_forward, _backward)


def _for_each(function: Callable[[Any], Any], inputs: Any) -> Any:
    """`jax.lax.map`, but what belongs to a turn is taken from the arrays at the end of the turn before.

    XLA fuses the taking of a slice with whatever reads it: where that is an exponential over scores, the loop computes where
    in the array each row's logsumexp and each key's segment lies for every score again, and is not vectorised.
    """
    turns = jax.tree.leaves(inputs)[0].shape[0]

    def take(turn: jax.Array | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, turn, keepdims=False), inputs)

    def body(taken: Any, turn: jax.Array) -> tuple[Any, Any]:
        return take(jnp.minimum(turn + 1, turns - 1)), function(taken)

    return jax.lax.scan(body, take(0), jnp.arange(turns, dtype=jnp.int32))[1]


def _mix(head: Head, *, spec: AttentionSpec, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """The weighted values (G, S, D) in the compute dtype and the logsumexp of the scores (G, S) in the statistics dtype."""
    groups, length, head_dim = head.query.shape
    mixed, log_total = [], []
    queue = _Queue(groups, length, spec)
    for block in queue.blocks:
        query_RD = queue.wait(_queries(head, block, spec, policy))
        scores = [_scores(query_RD, head, block, keys, spec, policy)[0] for keys in block.keys]
        largest_R1 = reduce(jnp.maximum, (jnp.max(scores_RT, axis=-1, keepdims=True) for scores_RT in scores))
        weights = [jnp.exp(scores_RT - largest_R1) for scores_RT in scores]
        total_R1 = _sum(jnp.sum(weights_RT, axis=-1, keepdims=True) for weights_RT in weights)
        summed_RD = _sum(
            product(weights_RT.astype(policy.compute), head.value[keys.first : keys.last], 1, 0, policy)
            for weights_RT, keys in zip(weights, block.keys, strict=True)
        )
        queue.leave(summed_RD)
        mixed.append((summed_RD / total_R1).astype(policy.compute).reshape(groups, -1, head_dim))
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
    key_gradient_DS, value_gradient_DS = (jnp.zeros(x.shape[::-1], statistics) for x in (head.key, head.value))
    queue = _Queue(groups, length, spec)
    # The other kernel's products of float32 are as fast where they are small.
    turned = transposed if queue.is_long or policy.compute != statistics else jnp.transpose
    for block in queue.blocks:
        query_RD, gradient_RD = queue.wait(_queries(head, block, spec, policy)), _rows(gradient_GSD, block)
        log_total_R1, delta_R1 = _rows(log_total_GS[..., None], block), _rows(delta_GS[..., None], block)
        query_DR, gradient_DR = turned(query_RD), turned(gradient_RD)
        to_query = []
        for keys in block.keys:
            seen = slice(keys.first, keys.last)
            scores_RT, slope_RT = _scores(query_RD, head, block, keys, spec, policy)
            weights_RT = jnp.exp(scores_RT - log_total_R1)
            pulled_RT = weights_RT * (product(gradient_RD, head.value[seen], 1, 1, policy) - delta_R1)
            if slope_RT is not None:
                pulled_RT = pulled_RT * slope_RT
            pulled_RT = pulled_RT.astype(policy.compute)
            to_query.append(product(pulled_RT, head.key[seen], 1, 0, policy))
            to_key_DT = product(query_DR, pulled_RT, 1, 0, policy)
            to_value_DT = product(gradient_DR, weights_RT.astype(policy.compute), 1, 0, policy)
            key_gradient_DS = key_gradient_DS.at[:, seen].add(to_key_DT)
            value_gradient_DS = value_gradient_DS.at[:, seen].add(to_value_DT)
        queue.leave(to_key_DT, to_value_DT)
        query_gradients.append(_sum(to_query).reshape(groups, -1, head_dim))
    query_gradient = jnp.concatenate(query_gradients, axis=1) * spec.scale
    if not _scales_queries(policy):
        key_gradient_DS = key_gradient_DS * spec.scale
    gradients = query_gradient, transposed_sums(key_gradient_DS), transposed_sums(value_gradient_DS)
    return tuple(gradient.astype(policy.compute) for gradient in gradients)  # type: ignore[return-value]


class _Queue:
    """Blocks, of which few enough are worked on at once.

    XLA computes all blocks' scores, then all blocks' weights, and so on, if it may: as long as those stay in the cache, that
    keeps all its threads busy; of long rows they would go to memory and back with every step.

    is_long: whether blocks wait for others at all.
    """

    def __init__(self, groups: int, length: int, spec: AttentionSpec) -> None:
        self.blocks = tuple(_blocks(groups, length, spec))
        largest = max(
            groups * (block.stop - block.start) * (block.keys[-1].last - block.keys[0].first) for block in self.blocks
        )
        self._at_once = max(1, MOST_SCORES // largest)
        self._left: list[jax.Array] = []
        self.is_long = self._at_once < len(self.blocks)

    def wait(self, query_RD: jax.Array) -> jax.Array:
        """The next block's queries, once an earlier block is done.

        An optimisation barrier would say that, but XLA on a CPU takes barriers away before it orders operations.  A product
        with zero it may not simplify: of an infinity it is NaN (then in all later blocks, of a loss that is lost anyway).
        """
        if len(self._left) < self._at_once:
            return query_RD
        return query_RD + 0 * self._left[-self._at_once].astype(query_RD.dtype)

    def leave(self, *results: jax.Array) -> None:
        """The block is done when these are there."""
        self._left.append(_sum(result[:1, :1] for result in results))


def _blocks(groups: int, length: int, spec: AttentionSpec) -> Iterator[_Block]:
    wanted = max(length / MOST_BLOCKS, min(ENOUGH_ROWS / groups, length / FEW_BLOCKS))
    size = max(1, math.ceil(wanted / SMALLEST_BLOCK)) * SMALLEST_BLOCK
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if spec.window is None else max(0, start - spec.window + 1)
        last = stop if spec.causal else length
        diagonal = start if spec.causal else last
        # Every query of the block sees what is not before `whole`.
        whole = first if spec.window is None else min(max(first, stop - spec.window), diagonal)
        pieces = (_Keys(first, whole, True), _Keys(whole, diagonal, False), _Keys(diagonal, last, True))
        yield _Block(start, stop, tuple(part for piece in pieces for part in _parts(piece)))


def _parts(keys: _Keys) -> Iterator[_Keys]:
    """In as few and equal parts as `MOST_KEYS` allows."""
    count = -(-(keys.last - keys.first) // MOST_KEYS)
    ends = [keys.first + (keys.last - keys.first) * part // max(count, 1) for part in range(count + 1)]
    return (_Keys(first, last, keys.cut) for first, last in pairwise(ends))


def _rows(x_GSD: jax.Array, block: _Block) -> jax.Array:
    """The queries of a block of all groups, (R, D)."""
    return x_GSD[:, block.start : block.stop].reshape(-1, x_GSD.shape[-1])


def _scales_queries(policy: Policy) -> bool:
    """Whether scores are scaled by way of their queries, which are fewer; it would round those of a lower precision."""
    return policy.compute == policy.statistics


def _queries(head: Head, block: _Block, spec: AttentionSpec, policy: Policy) -> jax.Array:
    query_RD = _rows(head.query, block)
    return query_RD * spec.scale if _scales_queries(policy) else query_RD


def _scores(
    query_RD: jax.Array, head: Head, block: _Block, keys: _Keys, spec: AttentionSpec, policy: Policy
) -> tuple[jax.Array, jax.Array | None]:
    """Scores (R, T) in the statistics dtype, masked; and the slope of their soft cap, if there is one."""
    scores_RT = product(query_RD, head.key[keys.first : keys.last], 1, 1, policy)
    if not _scales_queries(policy):
        scores_RT = scores_RT * spec.scale
    slope_RT = None
    if spec.softcap is not None:
        capped_RT = jnp.tanh(scores_RT / spec.softcap)
        scores_RT, slope_RT = capped_RT * spec.softcap, 1 - capped_RT * capped_RT
    groups = head.query.shape[0]
    described = Visibility(
        jnp.asarray(np.tile(np.arange(block.start, block.stop, dtype=np.int32), groups)),
        jnp.arange(keys.first, keys.last, dtype=jnp.int32),
        jnp.tile(head.segments[None, block.start : block.stop], groups),
        head.segments[None, keys.first : keys.last],
    )
    seen_RT = visible(described, spec if keys.cut else replace(spec, causal=False, window=None))[0]
    return jnp.where(seen_RT, scores_RT, np.finfo(policy.statistics).min), slope_RT


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    """Without a zero to begin with, to which XLA would add."""
    return reduce(jnp.add, parts)
