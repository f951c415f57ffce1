"""The Transformer: embeddings, a scan over stacked layers, a final norm and an output head.

Shape legend: B batch, S sequence, E hidden, V vocabulary, T cache length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.families.rope import RopeSpec
from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.jax_backend.attention import cache_visibility, sequence_visibility
from jaxllm.jax_backend.model.attention import CacheT, Context, KeyValue
from jaxllm.jax_backend.model.block import Block
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.experts import Routing
from jaxllm.jax_backend.model.head import ClassificationHead, MaskedLmHead, build_head
from jaxllm.jax_backend.model.linear import Embedding
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.parameter import stacked
from jaxllm.jax_backend.model.rope import Tables, rotary_tables
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.stack import Stretch, stretches
from jaxllm.jax_backend.model.tap import NO_TAP, Points, Tap
from jaxllm.jax_backend.precision import Policy
from jaxllm.jax_backend.remat import named, rematerialised

# What a scan hands to each layer: weights, index, its part of the cache, offsets of its tap; and what comes back.
LayerInputs: TypeAlias = tuple[Any, jax.Array, Any, Points | None]
LayerOutputs: TypeAlias = tuple[Any, Points | None, Routing | None]


class Transformer(nnx.Module):
    """A model of one stack of layers, of any family."""

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        self.embed = Embedding(spec.vocab_size, spec.hidden_size, ("vocab", "embed"), runtime)
        self.position_embed = (
            Embedding(spec.max_positions + spec.position_offset, spec.hidden_size, ("position", "embed"), runtime)
            if spec.learned_positions
            else None
        )
        self.token_type_embed = (
            Embedding(spec.token_types, spec.hidden_size, ("token_type", "embed"), runtime) if spec.token_types else None
        )
        post = spec.norm.place == "post"
        self.embedding_norm = Norm(spec.norm, (spec.hidden_size,), ("embed",), runtime) if post else None
        self.layers = stacked(lambda: Block(spec, runtime), spec.layers)
        self.final_norm = None if post else Norm(spec.norm, (spec.hidden_size,), ("embed",), runtime)
        self.head = build_head(spec, runtime)
        self.spec = spec
        self.runtime = runtime

    def __call__(
        self,
        inputs_BS: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array,
        key: jax.Array | None = None,
        tap: Tap = NO_TAP,
        token_types_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, S, V) in the compute dtype, or (B, 1, L) of L outputs for a whole row.

        key: turns dropout on, where the spec has any.  tap: sees every point.  token_types: None: all of the first type.
        """
        return self.routed(inputs_BS, positions_BS, segments_BS, key, tap, token_types_BS)[0]

    def routed(
        self,
        inputs_BS: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array,
        key: jax.Array | None = None,
        tap: Tap = NO_TAP,
        token_types_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """The same, and what the routers of all layers did, where there are experts."""
        length = inputs_BS.shape[1]
        visibility = sequence_visibility(segments_BS, self.runtime.layout.token_order(length))
        context = Context(visibility, self._rotary(positions_BS, length), key, tap=tap)
        x_BSE = tap("embedding", self._embed(inputs_BS, positions_BS, key, visibility.query_index, token_types_BS))
        x_BSE, _, routing = self._layers(x_BSE, context, None)
        return self._logits(x_BSE, tap, key), routing

    def decode(self, tokens_BS: jax.Array, offset: jax.Array, last: jax.Array, cache: KeyValue) -> tuple[jax.Array, KeyValue]:
        """Logits (B, V) after token `last` of `tokens`, which continue the cache at `offset`; and the longer cache."""
        batch, length = tokens_BS.shape
        positions_BS = jnp.broadcast_to(offset + jnp.arange(length, dtype=jnp.int32), (batch, length))
        longest = cache.key.shape[2]
        visibility = cache_visibility(offset, length, longest)
        context = Context(visibility, self._rotary(positions_BS, longest), offset=offset)
        x_BSE, new_cache, _ = self._layers(self._embed(tokens_BS, positions_BS, None, visibility.query_index), context, cache)
        x_BSE = jax.lax.dynamic_slice_in_dim(x_BSE, last, 1, axis=1)
        return self._logits(x_BSE, context.tap)[:, 0], new_cache

    def _rotary(self, positions_BS: jax.Array, length: int) -> dict[RopeSpec, Tables]:
        """Of every kind of rotary positions that a layer has.  length: of the longest row."""
        head_dim, policy = self.spec.attention.head_dim, self.runtime.policy
        kinds = dict.fromkeys(attention.rope for attention in self.spec.attentions if attention.rope is not None)
        return {rope: rotary_tables(rope, head_dim, positions_BS, length, policy) for rope in kinds}

    def _embed(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        key: jax.Array | None,
        index_S: jax.Array,
        token_types_BS: jax.Array | None = None,
    ) -> jax.Array:
        x_BSE = self.embed(tokens_BS)
        if self.spec.padding_token is not None:
            is_padding_BS1 = (tokens_BS == self.spec.padding_token)[..., None]
            x_BSE = jnp.where(is_padding_BS1, jax.lax.stop_gradient(x_BSE), x_BSE)
        if self.spec.embedding_scale is not None:
            scale = np.asarray(self.spec.embedding_scale, self.runtime.policy.statistics)
            x_BSE = x_BSE * jnp.asarray(scale, x_BSE.dtype)
        if self.token_type_embed is not None:
            x_BSE = x_BSE + self.token_type_embed(jnp.zeros_like(tokens_BS) if token_types_BS is None else token_types_BS)
        if self.position_embed is not None:
            x_BSE = x_BSE + self.position_embed(positions_BS + self.spec.position_offset)
        if self.embedding_norm is not None:
            x_BSE = self.embedding_norm(x_BSE)
        x_BSE = self.runtime.layout.constrain(x_BSE, "batch", "residual", "hidden")
        # Layers fold in their index, 0 to L - 1; L stands for what comes before them.
        key = None if key is None else jax.random.fold_in(key, self.spec.layers)
        return token_dropout(x_BSE, self.spec.embedding_dropout, key, Site.EMBEDDING, index_S)

    def _layers(self, x_BSE: jax.Array, context: Context, cache: CacheT) -> tuple[jax.Array, CacheT, Routing | None]:
        """All layers in order, in scans (`stack.Stretch`), so that compile time does not grow with their number."""
        graphdef, stack = nnx.split(self.layers, graph=False)

        def layer(attention: AttentionSpec, x_BSE: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, LayerOutputs]:
            weights, index, layer_cache, offsets = inputs
            key = None if context.key is None else jax.random.fold_in(context.key, index)
            tap = context.tap.of_layer(offsets)
            block = nnx.merge(graphdef, weights)
            x_BSE = named(x_BSE, "layer_input")
            x_BSE, layer_cache, routing = block(x_BSE, attention, context._replace(key=key, tap=tap), layer_cache)
            return x_BSE, (layer_cache, tap.records(), routing)

        indices = jnp.arange(self.spec.layers, dtype=jnp.int32)
        inputs = (stack, indices, cache, context.tap.layer_offsets())
        outputs = []
        for stretch in stretches(self.spec.attentions):
            x_BSE, output = self._scan(layer, stretch, x_BSE, stretch.take(inputs))
            outputs.append(output)
        joined = outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        new_cache, records, routing = joined
        context.tap.keep_layers(records)
        return x_BSE, new_cache, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), routing)

    def _scan(
        self, layer: Callable[..., tuple[jax.Array, LayerOutputs]], stretch: Stretch, x_BSE: jax.Array, inputs: LayerInputs
    ) -> tuple[jax.Array, LayerOutputs]:
        """One stretch of layers.  Leaves of `inputs` are as `Stretch.take` gives them, of the outputs (layers, ...)."""
        remat = self.runtime.remat
        if len(stretch.period) == 1:
            return jax.lax.scan(rematerialised(partial(layer, stretch.period[0]), remat), x_BSE, inputs)

        def at(place: int, attention: AttentionSpec, x_BSE: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, LayerOutputs]:
            # Picked here, within what is rematerialised: picked before, each layer's weights would be kept as activations.
            return layer(attention, x_BSE, jax.tree.map(lambda leaf: leaf[place], inputs))

        layers = [rematerialised(partial(at, *placed), remat) for placed in enumerate(stretch.period)]

        def period(x_BSE: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, LayerOutputs]:
            outputs = []
            for each in layers:
                x_BSE, output = each(x_BSE, inputs)
                outputs.append(output)
            return x_BSE, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

        x_BSE, outputs = jax.lax.scan(period, x_BSE, inputs)
        return x_BSE, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)

    def _logits(self, x_BSE: jax.Array, tap: Tap, key: jax.Array | None = None) -> jax.Array:
        if self.final_norm is not None:
            x_BSE = tap("final_norm", self.final_norm(x_BSE))
        x_BSE = self.runtime.layout.constrain(x_BSE, "batch", "sequence", "hidden")
        if isinstance(self.head, ClassificationHead):
            key = None if key is None else jax.random.fold_in(key, self.spec.layers + 1)
            return tap("logits", self.head(x_BSE, key))
        if isinstance(self.head, MaskedLmHead):
            logits_BSV = self.embed.attend(self.head(x_BSE)) + self.head.bias[...]
        else:
            logits_BSV = self.embed.attend(x_BSE) if self.head is None else self.head(x_BSE)
        if self.spec.final_softcap is not None:
            logits_BSV = jnp.tanh(logits_BSV / self.spec.final_softcap) * self.spec.final_softcap
        return tap("logits", self.runtime.layout.constrain(logits_BSV, "batch", "sequence", "vocab"))


def empty_cache(spec: ModelSpec, policy: Policy, batch: int, length: int) -> KeyValue:
    """Room for the keys and values of `length` tokens in every layer, (L, B, T, K, D) each."""
    shape = (spec.layers, batch, length, spec.attention.kv_heads, spec.attention.head_dim)
    return KeyValue(jnp.zeros(shape, policy.compute), jnp.zeros(shape, policy.compute))
