"""The Transformer: embeddings, a scan over stacked layers, a final norm and an output head; an encoder beside them or not.

Shape legend: B batch, S sequence, R tokens of a source, E hidden, V vocabulary, T cache length, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.families.rope import RopeSpec
from jaxllm.families.spec import ModelSpec
from jaxllm.jax_backend.attention import cache_visibility, sequence_visibility, source_visibility
from jaxllm.jax_backend.model.attention import CacheT, Context, KeyValue, Source
from jaxllm.jax_backend.model.block import Block
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.encoder import Encoder
from jaxllm.jax_backend.model.experts import Routing
from jaxllm.jax_backend.model.head import ClassificationHead, MaskedLmHead, Projection, build_head, last_token
from jaxllm.jax_backend.model.linear import Embedding, Linear
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.parameter import stacked
from jaxllm.jax_backend.model.relative import RelativeBias
from jaxllm.jax_backend.model.rope import Tables, rotary_tables
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.scan import run_layers
from jaxllm.jax_backend.model.tap import NO_TAP, Tap
from jaxllm.jax_backend.precision import Policy

ENCODER = "encoder"
"""What the encoder's parameters, and its points, begin with."""


class Text(NamedTuple):
    """The rows that a pass reads, (B, S) or (B, R) each.

    positions, segments: as in `jaxllm.data.batch.Batch`.  token_types: None: all of the first type.  source, source_segments:
    of an encoder-decoder.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    token_types: jax.Array | None = None
    source: jax.Array | None = None
    source_segments: jax.Array | None = None


class Hidden(NamedTuple):
    """What comes out of the last layer: states (B, S, E), what they were made in, and what the routers of all layers did.

    last: (B,) of a head that reads the last token of a row, where it stands.
    """

    states: jax.Array
    context: Context
    routing: Routing | None
    last: jax.Array | None = None


class Transformer(nnx.Module):
    """A model of any family: a stack of layers that makes logits, and in an encoder-decoder the stack that it reads."""

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        self.embed = Embedding(runtime.layout.vocabulary(spec), spec.hidden_size, ("vocab", "embed"), runtime)
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
        self.encoder = None if spec.encoder is None else Encoder(spec, spec.encoder, runtime)
        cross = None if spec.encoder is None else spec.encoder.cross
        self.layers = stacked(lambda: Block(spec, runtime, cross), spec.layers)
        self.relative_bias = None if spec.attention.relative is None else RelativeBias(spec.attention, runtime)
        self.final_norm = None if post else Norm(spec.norm, (spec.hidden_size,), ("embed",), runtime)
        self.head = build_head(spec, runtime)
        self.spec = spec
        self.runtime = runtime

    def __call__(self, text: Text, key: jax.Array | None = None, tap: Tap = NO_TAP) -> jax.Array:
        """Logits (B, S, V) in the compute dtype, or (B, 1, L) of L outputs for a whole row.

        key: turns dropout on, where the spec has any.  tap: sees every point.
        """
        return self.routed(text, key, tap)[0]

    def routed(self, text: Text, key: jax.Array | None = None, tap: Tap = NO_TAP) -> tuple[jax.Array, Routing | None]:
        """The same, and what the routers of all layers did, where there are experts."""
        hidden = self.hidden(text, key, tap)
        return self._own(self.outputs(hidden)), hidden.routing

    def hidden(self, text: Text, key: jax.Array | None = None, tap: Tap = NO_TAP) -> Hidden:
        """What comes out of the last layer, for `outputs` or `projection`."""
        length = text.tokens.shape[1]
        visibility = sequence_visibility(text.segments, self.runtime.layout.token_order(length))
        if self.relative_bias is not None:
            visibility = visibility._replace(bias=self.relative_bias(length, length))
        source = self._source(text, key, tap)
        context = Context(visibility, self._rotary(text.positions, length), key, tap=tap, source=source)
        x_BSE = self._embed(text.tokens, text.positions, key, visibility.query_index, text.token_types)
        x_BSE, _, routing = self._layers(tap("embedding", x_BSE), context, None)
        return Hidden(x_BSE, context, routing, last_token(self.spec.head, text.tokens, text.segments))

    def _source(self, text: Text, key: jax.Array | None, tap: Tap) -> Source | None:
        """What the layers read of the source, in a model with an encoder."""
        if self.encoder is None:
            return None
        if text.source is None or text.source_segments is None:
            raise ValueError("an encoder-decoder needs a source")
        states_BRE = self.encode(text.source, text.source_segments, key, tap.of_stack(ENCODER))
        return Source(source_visibility(text.source_segments, text.tokens.shape[1]), states_BRE)

    def encode(
        self, source_BR: jax.Array, segments_BR: jax.Array, key: jax.Array | None = None, tap: Tap = NO_TAP
    ) -> jax.Array:
        """What comes out of the encoder, (B, R, E)."""
        if self.encoder is None:
            raise ValueError("this model has no encoder")
        # Layers fold in their index, L the embeddings and L + 1 the head; the encoder has a tree of keys of its own.
        key = None if key is None else jax.random.fold_in(key, self.spec.layers + 2)
        places_R = jnp.arange(source_BR.shape[1], dtype=jnp.int32)
        return self.encoder(self._embed(source_BR, places_R, key, places_R), segments_BR, key, tap)

    def memory(self, states_BRE: jax.Array) -> KeyValue:
        """Keys and values that the layers make of what came out of the encoder, (L, B, R, K, D) each."""
        graphdef, weights = nnx.split(self.layers, graph=False)

        def of_layer(_: None, layer: Any) -> tuple[None, KeyValue]:
            attention = nnx.merge(graphdef, layer).cross_attention
            if attention is None:
                raise ValueError("this model has no encoder")
            return None, attention.keys_and_values(states_BRE)

        return jax.lax.scan(of_layer, None, weights)[1]

    def decode(
        self,
        tokens_BS: jax.Array,
        offset: jax.Array,
        last: jax.Array,
        cache: KeyValue,
        memory: KeyValue | None = None,
        source_segments_BR: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Logits (B, V) after token `last` of `tokens`, which continue the cache at `offset`; and the longer cache.

        memory, source_segments: of an encoder-decoder, `memory` of its source and what of that is padding.
        """
        batch, length = tokens_BS.shape
        positions_BS = jnp.broadcast_to(offset + jnp.arange(length, dtype=jnp.int32), (batch, length))
        longest = cache.key.shape[2]
        visibility = cache_visibility(offset, length, longest)
        if self.relative_bias is not None:
            bias_HTT = self.relative_bias(longest, longest)
            visibility = visibility._replace(bias=jax.lax.dynamic_slice_in_dim(bias_HTT, offset, length, axis=1))
        source = None if source_segments_BR is None else Source(source_visibility(source_segments_BR, length))
        context = Context(visibility, self._rotary(positions_BS, longest), offset=offset, source=source)
        x_BSE = self._embed(tokens_BS, positions_BS, None, visibility.query_index)
        x_BSE, new_cache, _ = self._layers(x_BSE, context, cache, memory)
        x_BSE = jax.lax.dynamic_slice_in_dim(x_BSE, last, 1, axis=1)
        return self._own(self.outputs(Hidden(x_BSE, context, None)))[:, 0], new_cache

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

    def _layers(
        self, x_BSE: jax.Array, context: Context, cache: CacheT, memory: KeyValue | None = None
    ) -> tuple[jax.Array, CacheT, Routing | None]:
        return run_layers(self.layers, self.spec.attentions, x_BSE, context, cache, self.runtime.remat, memory)

    def projection(self, hidden: Hidden) -> Projection:
        """What the logits of a language model are made of."""
        x_BSE, bias_V = self._final(hidden), None
        if isinstance(self.head, MaskedLmHead):
            x_BSE = self.head(self.runtime.layout.constrain(x_BSE, "batch", "sequence", "hidden"))
            bias_V = self.head.bias[...]
        if isinstance(self.head, Linear):
            return Projection(x_BSE, self.head.kernel[...], self.head.axes, bias_V)
        return Projection(x_BSE, self.embed.embedding[...], self.embed.axes, bias_V)

    def _final(self, hidden: Hidden) -> jax.Array:
        """What the head reads."""
        x_BSE, context = hidden.states, hidden.context
        if self.final_norm is not None:
            x_BSE = context.tap("final_norm", self.final_norm(x_BSE))
        return token_dropout(
            x_BSE, self.spec.final_dropout, self._head_key(context), Site.FINAL, context.visibility.query_index
        )

    def _head_key(self, context: Context) -> jax.Array | None:
        return None if context.key is None else jax.random.fold_in(context.key, self.spec.layers + 1)

    def _own(self, outputs_BSV: jax.Array) -> jax.Array:
        """Without what fills up the vocabulary."""
        return outputs_BSV[..., : self.spec.outputs]

    def outputs(self, hidden: Hidden) -> jax.Array:
        """Logits or outputs: see `__call__`.  What fills up the vocabulary has logits of minus infinity: it is never chosen."""
        tap, policy = hidden.context.tap, self.runtime.policy
        x_BSE = self.runtime.layout.constrain(self._final(hidden), "batch", "sequence", "hidden")
        if self.spec.head_scale is not None:
            x_BSE = (x_BSE.astype(policy.statistics) * self.spec.head_scale).astype(policy.compute)
        if isinstance(self.head, ClassificationHead):
            return tap("logits", self.head(x_BSE, hidden.last, self._head_key(hidden.context)))
        if isinstance(self.head, MaskedLmHead):
            logits_BSV = self.embed.attend(self.head(x_BSE)) + self.head.bias[...]
        else:
            logits_BSV = self.embed.attend(x_BSE) if self.head is None else self.head(x_BSE)
        if self.spec.final_softcap is not None:
            logits_BSV = jnp.tanh(logits_BSV / self.spec.final_softcap) * self.spec.final_softcap
        if logits_BSV.shape[-1] > self.spec.vocab_size:
            entry_BSV = jax.lax.broadcasted_iota(jnp.int32, logits_BSV.shape, 2)
            logits_BSV = jnp.where(entry_BSV < self.spec.vocab_size, logits_BSV, -jnp.inf)
        return tap("logits", self.runtime.layout.constrain(logits_BSV, "batch", "sequence", "vocab"))


def empty_cache(spec: ModelSpec, policy: Policy, batch: int, length: int) -> KeyValue:
    """Room for the keys and values of `length` tokens in every layer, (L, B, T, K, D) each."""
    shape = (spec.layers, batch, length, spec.attention.kv_heads, spec.attention.head_dim)
    return KeyValue(jnp.zeros(shape, policy.compute), jnp.zeros(shape, policy.compute))
