"""The Transformer: embeddings, a scan over stacked layers, a final norm and an output head.

Shape legend: B batch, S sequence, E hidden, V vocabulary, T cache length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.spec import ModelSpec
from jaxllm.jax_backend.attention import cache_visibility, sequence_visibility
from jaxllm.jax_backend.model.attention import CacheT, Context, KeyValue
from jaxllm.jax_backend.model.block import Block
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.linear import Embedding, Linear
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.parameter import stacked
from jaxllm.jax_backend.model.rope import rotary_tables
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.tap import NO_TAP, Points, Tap
from jaxllm.jax_backend.precision import Policy
from jaxllm.jax_backend.remat import named, rematerialised


class Transformer(nnx.Module):
    """A decoder-only language model of any family."""

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        self.embed = Embedding(spec.vocab_size, spec.hidden_size, ("vocab", "embed"), runtime)
        self.position_embed = (
            Embedding(spec.max_positions, spec.hidden_size, ("position", "embed"), runtime) if spec.learned_positions else None
        )
        self.layers = stacked(lambda: Block(spec, runtime), spec.layers)
        self.final_norm = Norm(spec.norm, spec.hidden_size, runtime)
        self.head = (
            None
            if spec.tie_embeddings
            else Linear((spec.hidden_size, spec.vocab_size), ("embed", "vocab"), bias=False, runtime=runtime)
        )
        self.spec = spec
        self.runtime = runtime

    def __call__(
        self,
        inputs_BS: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array,
        key: jax.Array | None = None,
        tap: Tap = NO_TAP,
    ) -> jax.Array:
        """Logits (B, S, V) in the compute dtype.  key: turns dropout on, where the spec has any.  tap: sees every point."""
        order_S = self.runtime.layout.token_order(inputs_BS.shape[1])
        context = Context(sequence_visibility(segments_BS, order_S), self._rotary(positions_BS), key, tap=tap)
        x_BSE = tap("embedding", self._embed(inputs_BS, positions_BS, key, context.visibility.query_index))
        x_BSE, _ = self._layers(x_BSE, context, None)
        return self._logits(x_BSE, tap)

    def decode(self, tokens_BS: jax.Array, offset: jax.Array, last: jax.Array, cache: KeyValue) -> tuple[jax.Array, KeyValue]:
        """Logits (B, V) after token `last` of `tokens`, which continue the cache at `offset`; and the longer cache."""
        batch, length = tokens_BS.shape
        positions_BS = jnp.broadcast_to(offset + jnp.arange(length, dtype=jnp.int32), (batch, length))
        visibility = cache_visibility(offset, length, cache.key.shape[2])
        context = Context(visibility, self._rotary(positions_BS), offset=offset)
        x_BSE, new_cache = self._layers(self._embed(tokens_BS, positions_BS, None, visibility.query_index), context, cache)
        x_BSE = jax.lax.dynamic_slice_in_dim(x_BSE, last, 1, axis=1)
        return self._logits(x_BSE, context.tap)[:, 0], new_cache

    def _rotary(self, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if self.spec.rope is None:
            return None
        return rotary_tables(self.spec.rope, self.spec.attention.head_dim, positions_BS, self.runtime.policy)

    def _embed(self, tokens_BS: jax.Array, positions_BS: jax.Array, key: jax.Array | None, index_S: jax.Array) -> jax.Array:
        x_BSE = self.embed(tokens_BS)
        if self.position_embed is not None:
            x_BSE = x_BSE + self.position_embed(positions_BS)
        x_BSE = self.runtime.layout.constrain(x_BSE, "batch", "residual", "hidden")
        # Layers fold in their index, 0 to L - 1; L stands for what comes before them.
        key = None if key is None else jax.random.fold_in(key, self.spec.layers)
        return token_dropout(x_BSE, self.spec.embedding_dropout, key, Site.EMBEDDING, index_S)

    def _layers(self, x_BSE: jax.Array, context: Context, cache: CacheT) -> tuple[jax.Array, CacheT]:
        """All layers in one scan, so that compile time does not grow with their number."""
        graphdef, stack = nnx.split(self.layers, graph=False)

        def layer(
            x_BSE: jax.Array, inputs: tuple[Any, jax.Array, CacheT, Points | None]
        ) -> tuple[jax.Array, tuple[CacheT, Points | None]]:
            weights, index, layer_cache, offsets = inputs
            key = None if context.key is None else jax.random.fold_in(context.key, index)
            tap = context.tap.of_layer(offsets)
            block = nnx.merge(graphdef, weights)
            x_BSE = named(x_BSE, "layer_input")
            x_BSE, layer_cache = block(x_BSE, context._replace(key=key, tap=tap), layer_cache)
            return x_BSE, (layer_cache, tap.records())

        indices = jnp.arange(self.spec.layers, dtype=jnp.int32)
        inputs = (stack, indices, cache, context.tap.layer_offsets())
        x_BSE, (new_cache, records) = jax.lax.scan(rematerialised(layer, self.runtime.remat), x_BSE, inputs)
        context.tap.keep_layers(records)
        return x_BSE, new_cache

    def _logits(self, x_BSE: jax.Array, tap: Tap) -> jax.Array:
        x_BSE = tap("final_norm", self.final_norm(x_BSE))
        x_BSE = self.runtime.layout.constrain(x_BSE, "batch", "sequence", "hidden")
        logits_BSV = self.embed.attend(x_BSE) if self.head is None else self.head(x_BSE)
        return tap("logits", self.runtime.layout.constrain(logits_BSV, "batch", "sequence", "vocab"))


def empty_cache(spec: ModelSpec, policy: Policy, batch: int, length: int) -> KeyValue:
    """Room for the keys and values of `length` tokens in every layer, (L, B, T, K, D) each."""
    shape = (spec.layers, batch, length, spec.attention.kv_heads, spec.attention.head_dim)
    return KeyValue(jnp.zeros(shape, policy.compute), jnp.zeros(shape, policy.compute))
