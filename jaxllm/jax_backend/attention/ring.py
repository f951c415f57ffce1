"""Ring attention (Liu et al., arXiv:2310.01889): the sequence split over devices, whose keys and values go round.

Each device keeps its queries and meets the keys of every other device once.  Tokens are in zig-zag order
(`jaxllm.jax_backend.zigzag`): a device holds one early and one late chunk, and under a causal mask each of the N - 1 visits
costs every device the same half of a full one.  Which keys a query sees is decided from indices and segments, which travel with
the keys, so that packed documents are exact.

Memory is linear in the tokens of a device: scores exist for one block of keys at a time, and the backward pass sends keys and
values round again instead of keeping what came by.

Shape legend: B batch, S tokens of a device, C = S / 2 tokens of a chunk, N devices of the ring, H heads, K key/value heads,
G = H / K, D head_dim, T keys of a block, R = S / T blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.online import Keys, Pulled, Queries, absorb, finish, gradients, nothing_yet
from jaxllm.jax_backend.attention.visibility import Visibility
from jaxllm.jax_backend.remat import ATTENTION_MIXED, named

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime

RING = "context"
"""The mesh axis that keys and values travel along."""

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 1024
"""Keys of a block: the largest divisor of a chunk in this range, else the whole chunk."""

TreeT = TypeVar("TreeT")
Visits = tuple[jax.Array, jax.Array]  # which chunk of queries meets which block of keys


def ring_attention(
    query_BSHD: jax.Array,
    key_BTKD: jax.Array,
    value_BTKD: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """As `AttentionKernel`, over rows in zig-zag order; exact, forward and backward.

    Only self-attention over whole rows, and no dropout of the weights: both are refused before a run starts.
    """
    if query_BSHD.shape[1] != key_BTKD.shape[1]:
        raise ValueError("ring attention is self-attention: there must be as many keys as queries")
    if dropout_key is not None and spec.dropout > 0.0:
        raise ValueError("ring attention has no dropout of its weights")
    return _attention(query_BSHD, key_BTKD, value_BTKD, visibility, spec, runtime)


# Differentiated by hand: JAX would keep the keys and values of every visit, that is, of the whole sequence.
@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, spec: AttentionSpec, runtime: Runtime
) -> jax.Array:
    return _forward(query, key, value, visibility, spec, runtime)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, spec: AttentionSpec, runtime: Runtime
) -> tuple[jax.Array, Any]:
    heads, kv_heads, totals, seen = _placement(visibility, runtime)
    on_device = _mapped(_forward_on_device, spec, runtime, (heads, kv_heads, kv_heads, seen), (heads, totals))
    # Kept by that name, both spare the backward pass another round.
    mixed, log_total = (named(leaf, ATTENTION_MIXED) for leaf in on_device(query, key, value, visibility))
    return mixed, (query, key, value, visibility, mixed, log_total)


def _backward(spec: AttentionSpec, runtime: Runtime, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    heads, kv_heads, totals, seen = _placement(kept[3], runtime)
    inputs = (heads, kv_heads, kv_heads, seen, heads, totals, heads)
    on_device = _mapped(_backward_on_device, spec, runtime, inputs, (heads, kv_heads, kv_heads))
    return (*on_device(*kept, gradient), None)


_attention.defvjp(_forward, _backward)


def _placement(visibility: Visibility, runtime: Runtime) -> tuple[Any, ...]:
    """PartitionSpecs of (B, S, H, D), (B, S, K, D), (B, S, H), and of a visibility's arrays."""
    spec = runtime.layout.spec
    index, segments = spec("sequence"), spec("batch", "sequence")
    seen = jax.tree.map(lambda leaf: index if leaf.ndim == 1 else segments, visibility)
    heads, kv_heads = (spec("batch", "sequence", axis, None) for axis in ("heads", "kv_heads"))
    return heads, kv_heads, spec("batch", "sequence", "heads"), seen


def _mapped(
    function: Callable[..., Any], spec: AttentionSpec, runtime: Runtime, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """`function(ring, ...)` on each device's part of its arguments."""
    mesh = runtime.layout.mesh
    bound = partial(function, _Ring(spec, runtime, int(mesh.shape[RING])))
    # Nothing is differentiated through the map, which is all that the check of replication is for.
    mapped: Callable[..., Any] = jax.shard_map(bound, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return mapped


class _Ring:
    """One device's view of a ring of N."""

    def __init__(self, spec: AttentionSpec, runtime: Runtime, devices: int) -> None:
        self.spec = spec
        self.policy = runtime.policy
        self.devices = devices

    def onward(self, tree: TreeT) -> TreeT:
        """Every array given to the next device, and taken from the one before."""
        to_next = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        moved: TreeT = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, RING, to_next), tree)
        return moved

    def visits(self, step: int | jax.Array, blocks: int) -> Visits:
        """What meets after `step` moves, when the keys of device (mine - step) mod N are here; `blocks` to a chunk.

        Of the four pairs of chunks, a causal mask leaves three at home.  Later it leaves two: the late chunk sees the other
        device's early chunk; besides, early sees early if the other comes before this device, else late sees late.
        """
        if not self.spec.causal:
            queries, keys = jnp.asarray([0, 0, 1, 1]), jnp.asarray([0, 1, 0, 1])
        elif isinstance(step, int) and step == 0:
            queries, keys = jnp.asarray([0, 1, 1]), jnp.asarray([0, 0, 1])
        else:
            kind = jnp.where(step <= jax.lax.axis_index(RING), 0, 1)
            queries, keys = jnp.stack([jnp.ones_like(kind), kind]), jnp.stack([jnp.zeros_like(kind), kind])
        of_chunk = keys[:, None] * blocks + jnp.arange(blocks)
        return jnp.repeat(queries, blocks), of_chunk.reshape(-1)


def _forward_on_device(
    ring: _Ring, query_BSHD: jax.Array, key_BSKD: jax.Array, value_BSKD: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array]:
    """The output (B, S, H, D) and the logsumexp of every query's scores (B, S, H)."""
    queries = _queries(query_BSHD, key_BSKD.shape[2], visibility)
    keys, blocks = _keys(key_BSKD, value_BSKD, visibility)

    def visit(running: Any, keys: Keys, step: int | jax.Array) -> Any:
        def one(running: Any, pair: Visits) -> tuple[Any, None]:
            chunk, block = pair
            met = absorb(_at(running, chunk), _at(queries, chunk), _at(keys, block), ring.spec, ring.policy)
            return _put(running, chunk, met), None

        return jax.lax.scan(one, running, ring.visits(step, blocks))[0]

    def meet(carry: tuple[Any, Keys], step: jax.Array) -> tuple[tuple[Any, Keys], None]:
        running, keys = carry
        following = ring.onward(keys)  # on its way while these are worked on
        return (visit(running, keys, step), following), None

    following = ring.onward(keys)
    running = visit(nothing_yet(queries.query, ring.policy), keys, 0)
    (running, keys), _ = jax.lax.scan(meet, (running, following), jnp.arange(1, ring.devices - 1))
    mixed, log_total = finish(visit(running, keys, jnp.asarray(ring.devices - 1)))
    return _uncut(mixed).astype(query_BSHD.dtype), _uncut(log_total)


def _backward_on_device(
    ring: _Ring,
    query_BSHD: jax.Array,
    key_BSKD: jax.Array,
    value_BSKD: jax.Array,
    visibility: Visibility,
    mixed_BSHD: jax.Array,
    log_total_BSH: jax.Array,
    gradient_BSHD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value.  Those of keys and values travel one step behind the keys they belong to."""
    kv_heads, statistics = key_BSKD.shape[2], ring.policy.statistics
    queries = _queries(query_BSHD, kv_heads, visibility)
    keys, blocks = _keys(key_BSKD, value_BSKD, visibility)
    delta_BSH = jnp.sum(mixed_BSHD.astype(statistics) * gradient_BSHD.astype(statistics), axis=-1)
    pulled = Pulled(*(_cut_queries(leaf, kv_heads) for leaf in (gradient_BSHD, log_total_BSH, delta_BSH)))
    nothing = tuple(jnp.zeros(leaf.shape, statistics) for leaf in (keys.key, keys.value))

    def visit(to_queries: jax.Array, keys: Keys, step: int | jax.Array) -> tuple[jax.Array, Any]:
        def one(sums: Any, pair: Visits) -> tuple[Any, None]:
            chunk, block = pair
            added = gradients(_at(queries, chunk), _at(keys, block), _at(pulled, chunk), ring.spec, ring.policy)
            places = (chunk, block, block)
            return tuple(leaf.at[at].add(more) for leaf, at, more in zip(sums, places, added, strict=True)), None

        (to_queries, *to_keys), _ = jax.lax.scan(one, (to_queries, *nothing), ring.visits(step, blocks))
        return to_queries, tuple(to_keys)

    def meet(carry: tuple[jax.Array, Any, Keys], step: jax.Array) -> tuple[tuple[jax.Array, Any, Keys], None]:
        to_queries, to_keys, keys = carry
        following, arrived = ring.onward(keys), ring.onward(to_keys)
        to_queries, added = visit(to_queries, keys, step)
        return (to_queries, jax.tree.map(jnp.add, arrived, added), following), None

    following = ring.onward(keys)
    to_queries, to_keys = visit(jnp.zeros(queries.query.shape, statistics), keys, 0)
    (to_queries, to_keys, keys), _ = jax.lax.scan(meet, (to_queries, to_keys, following), jnp.arange(1, ring.devices - 1))
    arrived = ring.onward(to_keys)
    to_queries, added = visit(to_queries, keys, jnp.asarray(ring.devices - 1))
    to_key, to_value = (_uncut_blocks(leaf) for leaf in ring.onward(jax.tree.map(jnp.add, arrived, added)))
    dtype = query_BSHD.dtype
    return _uncut(to_queries).astype(dtype), to_key.astype(dtype), to_value.astype(dtype)


def _at(tree: TreeT, place: jax.Array) -> TreeT:
    part: TreeT = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), tree)
    return part


def _put(tree: TreeT, place: jax.Array, part: TreeT) -> TreeT:
    whole: TreeT = jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, place, 0), tree, part)
    return whole


def _queries(query_BSHD: jax.Array, kv_heads: int, visibility: Visibility) -> Queries:
    """Both chunks of this device's queries: (2, B, K, G, C, D)."""
    segments = visibility.query_segments
    return Queries(
        _cut_queries(query_BSHD, kv_heads),
        visibility.query_index.reshape(2, -1),
        None if segments is None else segments.reshape(segments.shape[0], 2, -1).swapaxes(0, 1),
    )


def _cut_queries(x_BSHn: jax.Array, kv_heads: int) -> jax.Array:
    """(B, S, H, ...) -> (2, B, K, G, C, ...)."""
    batch, length, heads, *rest = x_BSHn.shape
    cut = x_BSHn.reshape(batch, 2, length // 2, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(cut, (1, 2), (0, 4))


def _uncut(x_2BKGCn: jax.Array) -> jax.Array:
    """The inverse of `_cut_queries`."""
    moved = jnp.moveaxis(x_2BKGCn, (0, 4), (1, 2))
    batch, _, chunk, kv_heads, groups, *rest = moved.shape
    return moved.reshape(batch, 2 * chunk, kv_heads * groups, *rest)


def _keys(key_BSKD: jax.Array, value_BSKD: jax.Array, visibility: Visibility) -> tuple[Keys, int]:
    """This device's keys and values in blocks, (R, B, K, T, D) each; and the number of blocks in a chunk."""
    size = _block(key_BSKD.shape[1] // 2)
    batch, length, kv_heads, head_dim = key_BSKD.shape
    key_RBKTD, value_RBKTD = (
        x.reshape(batch, length // size, size, kv_heads, head_dim).transpose(1, 0, 3, 2, 4) for x in (key_BSKD, value_BSKD)
    )
    segments = visibility.key_segments
    keys = Keys(
        key_RBKTD,
        value_RBKTD,
        visibility.key_index.reshape(-1, size),
        None if segments is None else segments.reshape(batch, -1, size).swapaxes(0, 1),
    )
    return keys, length // 2 // size


def _uncut_blocks(x_RBKTD: jax.Array) -> jax.Array:
    """(R, B, K, T, D) -> (B, S, K, D)."""
    blocks, batch, kv_heads, size, head_dim = x_RBKTD.shape
    return x_RBKTD.transpose(1, 0, 3, 2, 4).reshape(batch, blocks * size, kv_heads, head_dim)


def _block(chunk: int) -> int:
    """Keys of a block, which divides a chunk."""
    sizes = range(min(chunk, LARGEST_BLOCK), SMALLEST_BLOCK - 1, -1)
    return next((size for size in sizes if chunk % size == 0), chunk)
