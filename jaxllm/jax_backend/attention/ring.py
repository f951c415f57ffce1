"""Ring attention (Liu et al., arXiv:2310.01889): the sequence split over devices, whose keys and values go round.

Each device keeps its queries and meets the keys of every other device once.  Tokens are in zig-zag order
(`jaxllm.jax_backend.zigzag`): a device holds one early and one late chunk, and under a causal mask each of the N - 1 visits
costs every device the same half of a full one.  Which keys a query sees is decided from indices and segments, which travel with
the keys, so that packed documents are exact.

Memory is linear in the tokens of a device: scores exist for one block of keys at a time, and the backward pass sends keys and
values round again instead of keeping what came by.  What happens at a visit is a `Meeting`: splash attention's kernels, where
they can do it, or XLA operations.

Shape legend: B batch, S tokens of a device, N devices of the ring, H heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.ring_blocks import BlockMeeting
from jaxllm.jax_backend.attention.ring_visits import RING, Meeting, Ring
from jaxllm.jax_backend.attention.visibility import Visibility
from jaxllm.jax_backend.remat import ATTENTION_MIXED, named

if TYPE_CHECKING:
    from jaxllm.jax_backend.attention.splash import Blocks
    from jaxllm.jax_backend.model.runtime import Runtime


def ring_attention(
    query_BSHD: jax.Array,
    key_BTKD: jax.Array,
    value_BTKD: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    dropout_key: jax.Array | None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """As `AttentionKernel`, over rows in zig-zag order; exact, forward and backward.

    Only self-attention over whole rows, and no dropout of the weights: both are refused before a run starts.  blocks: of splash
    attention's kernels for the visits (`check_splash_ring` says what they can do); None: XLA operations.
    """
    if query_BSHD.shape[1] != key_BTKD.shape[1]:
        raise ValueError("ring attention is self-attention: there must be as many keys as queries")
    if dropout_key is not None and spec.dropout > 0.0:
        raise ValueError("ring attention has no dropout of its weights")
    if blocks is not None:  # those kernels do not scale
        query_BSHD = (query_BSHD.astype(jnp.float32) * spec.scale).astype(query_BSHD.dtype)
    return _attention(query_BSHD, key_BTKD, value_BTKD, visibility, spec, runtime, blocks)


# Differentiated by hand: JAX would keep the keys and values of every visit, that is, of the whole sequence.
@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    blocks: Blocks | None,
) -> jax.Array:
    return _forward(query, key, value, visibility, spec, runtime, blocks)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    blocks: Blocks | None,
) -> tuple[jax.Array, Any]:
    heads, kv_heads, totals, seen = _placement(visibility, runtime)
    on_device = _mapped(_forward_on_device, spec, runtime, blocks, (heads, kv_heads, kv_heads, seen), (heads, totals))
    # Kept by that name, both spare the backward pass another round.
    mixed, log_total = (named(leaf, ATTENTION_MIXED) for leaf in on_device(query, key, value, visibility))
    return mixed, (query, key, value, visibility, mixed, log_total)


def _backward(spec: AttentionSpec, runtime: Runtime, blocks: Blocks | None, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    heads, kv_heads, totals, seen = _placement(kept[3], runtime)
    inputs = (heads, kv_heads, kv_heads, seen, heads, totals, heads)
    on_device = _mapped(_backward_on_device, spec, runtime, blocks, inputs, (heads, kv_heads, kv_heads))
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
    function: Callable[..., Any], spec: AttentionSpec, runtime: Runtime, blocks: Blocks | None, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """`function(ring, meeting, ...)` on each device's part of its arguments."""
    mesh = runtime.layout.mesh
    ring = Ring(spec, runtime.policy, int(mesh.shape[RING]))
    meeting: Meeting = BlockMeeting()
    if blocks is not None:
        from jaxllm.jax_backend.attention.ring_splash import SplashMeeting

        meeting = SplashMeeting(blocks, interpret=mesh.devices.flat[0].platform != "tpu")
    # Nothing is differentiated through the map, which is all that the check of replication is for.
    mapped: Callable[..., Any] = jax.shard_map(
        partial(function, ring, meeting), mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )
    return mapped


def _forward_on_device(
    ring: Ring,
    meeting: Meeting,
    query_BSHD: jax.Array,
    key_BSKD: jax.Array,
    value_BSKD: jax.Array,
    visibility: Visibility,
) -> tuple[jax.Array, jax.Array]:
    """The output (B, S, H, D) and the logsumexp of every query's scores (B, S, H)."""
    queries = meeting.queries(query_BSHD, key_BSKD.shape[2], visibility)
    keys = meeting.keys(key_BSKD, value_BSKD, visibility)

    def meet(carry: tuple[Any, Any], step: jax.Array) -> tuple[tuple[Any, Any], None]:
        seen, keys = carry
        following = ring.onward(keys)  # on its way while these are worked on
        return (meeting.look(ring, seen, queries, keys, step), following), None

    following = ring.onward(keys)
    seen = meeting.look(ring, None, queries, keys, 0)
    (seen, keys), _ = jax.lax.scan(meet, (seen, following), jnp.arange(1, ring.devices - 1))
    mixed, log_total = meeting.output(meeting.look(ring, seen, queries, keys, jnp.asarray(ring.devices - 1)))
    return mixed.astype(query_BSHD.dtype), log_total


def _backward_on_device(
    ring: Ring,
    meeting: Meeting,
    query_BSHD: jax.Array,
    key_BSKD: jax.Array,
    value_BSKD: jax.Array,
    visibility: Visibility,
    mixed_BSHD: jax.Array,
    log_total_BSH: jax.Array,
    gradient_BSHD: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients of query, key and value.  Those of keys and values travel one step behind the keys they belong to."""
    kv_heads = key_BSKD.shape[2]
    queries = meeting.queries(query_BSHD, kv_heads, visibility)
    keys = meeting.keys(key_BSKD, value_BSKD, visibility)
    pulled = meeting.pulled(mixed_BSHD, log_total_BSH, gradient_BSHD, kv_heads)

    def add(first: Any, second: Any) -> Any:
        return jax.tree.map(jnp.add, first, second)

    def meet(carry: tuple[Any, Any, Any], step: jax.Array) -> tuple[tuple[Any, Any, Any], None]:
        to_queries, to_keys, keys = carry
        following, arrived = ring.onward(keys), ring.onward(to_keys)
        more, added = meeting.pull(ring, queries, keys, pulled, step)
        return (add(to_queries, more), add(arrived, added), following), None

    following = ring.onward(keys)
    to_queries, to_keys = meeting.pull(ring, queries, keys, pulled, 0)
    (to_queries, to_keys, keys), _ = jax.lax.scan(meet, (to_queries, to_keys, following), jnp.arange(1, ring.devices - 1))
    arrived = ring.onward(to_keys)
    more, added = meeting.pull(ring, queries, keys, pulled, jnp.asarray(ring.devices - 1))
    found = meeting.gradients(add(to_queries, more), ring.onward(add(arrived, added)))
    return tuple(leaf.astype(query_BSHD.dtype) for leaf in found)
