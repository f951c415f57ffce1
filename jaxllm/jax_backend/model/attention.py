"""Attention with grouped keys and values (arXiv:2305.13245): the projections around an attention kernel.

Shape legend: B batch, S queries, T keys, E hidden, H heads, K key/value heads, G = H / K queries per key, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.rope import RopeSpec
from jaxllm.families.spec import AttentionSpec, NormSpec
from jaxllm.jax_backend.attention.visibility import Visibility
from jaxllm.jax_backend.model.dropout import Site
from jaxllm.jax_backend.model.linear import Linear
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.rope import Tables, rotate
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.tap import NO_TAP, Tap


class KeyValue(NamedTuple):
    """Keys and values of earlier tokens, (B, T, K, D) each, with a leading `layers` axis outside the scan."""

    key: jax.Array
    value: jax.Array


CacheT = TypeVar("CacheT", KeyValue, None)  # what a layer is given is what it gives back


class Source(NamedTuple):
    """What the layers of a decoder read of an encoder.

    visibility: which of its tokens each query sees.  states_BRE: what came out of it; None where every layer is handed the keys
    and values that it makes of them.
    """

    visibility: Visibility
    states: jax.Array | None = None


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    visibility: which keys each query sees.  rotary: cosine and sine of each kind of rotary positions.  key: of dropout, if
    there is any.  offset: index of the first query in the cache, if there is one.  tap: what looks at the activations.
    source: what the layers attend to besides, in a decoder with an encoder.
    """

    visibility: Visibility
    rotary: Mapping[RopeSpec, Tables]
    key: jax.Array | None = None
    offset: jax.Array | None = None
    tap: Tap = NO_TAP
    source: Source | None = None


class Attention(nnx.Module):
    """Projections to query, key and value, attention, projection back."""

    def __init__(self, spec: AttentionSpec, norm: NormSpec, hidden: int, runtime: Runtime) -> None:
        heads, kv_heads, head_dim = spec.heads, spec.kv_heads, spec.head_dim
        query, key_value = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = Linear((hidden, heads, head_dim), query, spec.qkv_bias, runtime)
        self.key = Linear((hidden, kv_heads, head_dim), key_value, spec.qkv_bias, runtime)
        self.value = Linear((hidden, kv_heads, head_dim), key_value, spec.qkv_bias, runtime)
        self.output = Linear((heads, head_dim, hidden), ("heads", "head_dim", "embed"), spec.output_bias, runtime, inputs=2)
        self.query_norm = _heads_norm(spec, norm, "heads", heads, runtime)
        self.key_norm = _heads_norm(spec, norm, "kv_heads", kv_heads, runtime)
        self.runtime = runtime

    def __call__(self, x_BSE: jax.Array, spec: AttentionSpec, context: Context, cache: CacheT) -> tuple[jax.Array, CacheT]:
        """Self-attention.  spec: of this layer, of the same heads as the module."""
        x_BSE = self.runtime.layout.constrain(x_BSE, "batch", "sequence", "hidden")
        query_BSHD = self._queries(x_BSE)
        key_BSKD, value_BSKD = self.keys_and_values(x_BSE)
        if spec.rope is not None:
            tables = context.rotary[spec.rope]
            query_BSHD, key_BSKD = rotate(query_BSHD, tables), rotate(key_BSKD, tables)
        query_BSHD, key_BSKD = context.tap("query", query_BSHD), context.tap("key", key_BSKD)
        value_BSKD = context.tap("value", value_BSKD)
        if cache is not None:
            cache = _remember(cache, key_BSKD, value_BSKD, context)
            key_BSKD, value_BSKD = cache
        return self._mix(query_BSHD, KeyValue(key_BSKD, value_BSKD), spec, context.visibility, context.key), cache

    def across(self, x_BSE: jax.Array, spec: AttentionSpec, context: Context, memory: KeyValue | None) -> jax.Array:
        """Attention to the source.  memory: its keys and values, where they are known already."""
        source, tap = context.source, context.tap
        if source is None:
            raise ValueError("attention across needs a source")
        query_BSHD = tap("cross_query", self._queries(self.runtime.layout.constrain(x_BSE, "batch", "sequence", "hidden")))
        if memory is None:
            if source.states is None:
                raise ValueError("a source needs states where its keys and values are not known")
            memory = self.keys_and_values(source.states)
        memory = KeyValue(tap("cross_key", memory.key), tap("cross_value", memory.value))
        key = None if context.key is None else jax.random.fold_in(context.key, int(Site.CROSS_ATTENTION))
        return self._mix(query_BSHD, memory, spec, source.visibility, key)

    def keys_and_values(self, x_BTE: jax.Array) -> KeyValue:
        """(B, T, K, D) each, the keys normalised where the family does that."""
        constrain = self.runtime.layout.constrain
        key_BTKD = constrain(self.key(x_BTE), "batch", "sequence", "kv_heads", None)
        value_BTKD = constrain(self.value(x_BTE), "batch", "sequence", "kv_heads", None)
        return KeyValue(key_BTKD if self.key_norm is None else self.key_norm(key_BTKD), value_BTKD)

    def _queries(self, x_BSE: jax.Array) -> jax.Array:
        query_BSHD = self.runtime.layout.constrain(self.query(x_BSE), "batch", "sequence", "heads", None)
        return query_BSHD if self.query_norm is None else self.query_norm(query_BSHD)

    def _mix(
        self, query_BSHD: jax.Array, memory: KeyValue, spec: AttentionSpec, visibility: Visibility, key: jax.Array | None
    ) -> jax.Array:
        constrain = self.runtime.layout.constrain
        mixed_BSHD = self.runtime.attention(query_BSHD, *memory, visibility, spec, self.runtime, key)
        mixed_BSHD = constrain(mixed_BSHD, "batch", "sequence", "heads", None)
        return constrain(self.output(mixed_BSHD), "batch", "residual", "hidden")


def _heads_norm(spec: AttentionSpec, norm: NormSpec, axis: str, heads: int, runtime: Runtime) -> Norm | None:
    """The norm of queries or keys, if there is one."""
    if spec.query_key_norm is None:
        return None
    if spec.query_key_norm == "head":
        return Norm(norm, (spec.head_dim,), ("head_dim",), runtime)
    return Norm(norm, (heads, spec.head_dim), (axis, "head_dim"), runtime)


def _remember(cache: KeyValue, key_BSKD: jax.Array, value_BSKD: jax.Array, context: Context) -> KeyValue:
    """The cache with this call's keys and values written at its offset."""
    if context.offset is None:
        raise ValueError("a key/value cache needs the offset to write at")
    zero = jnp.zeros_like(context.offset)  # all start indices must have one dtype, with and without 64-bit JAX
    start = (zero, context.offset, zero, zero)
    return KeyValue(
        jax.lax.dynamic_update_slice(cache.key, key_BSKD, start), jax.lax.dynamic_update_slice(cache.value, value_BSKD, start)
    )
