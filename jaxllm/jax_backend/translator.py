"""Next-token logits of the targets of many sources, with a cache of keys and values.

Shape legend: B sources, R tokens of a source, K beams, N = B K targets, T cache length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxllm.families.spec import ModelSpec
from jaxllm.jax_backend.attention import xla_attention
from jaxllm.jax_backend.model.attention import KeyValue
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.transformer import empty_cache
from jaxllm.jax_backend.network import Params, build_network
from jaxllm.jax_backend.sharding import Layout

Tokens = NDArray[np.int32]


class JaxTranslator:
    """A `jaxllm.backend.Translator`; compiled once for a shape of sources.

    Parameters stay sharded as they are; targets are replicated over the data-parallel devices.
    """

    def __init__(self, spec: ModelSpec, runtime: Runtime, params: Mapping[str, jax.Array], beams: int, max_length: int) -> None:
        layout = Layout(runtime.layout.mesh, replicated=frozenset({"batch", "sequence", "residual"}))
        self._network = build_network(spec, replace(runtime, layout=layout, remat="none", attention=xla_attention))
        self._params = jax.jit(self._network.cast)(dict(params))
        self._spec, self._beams, self._max_length = spec, beams, max_length
        cached = layout.sharding("layers", "batch", None, "kv_heads", None)
        self._encode = jax.jit(self._encoded, out_shardings=(cached, layout.whole, cached))
        self._run = jax.jit(self._advanced, donate_argnums=(4,), out_shardings=(layout.whole, cached))
        self._length = 0
        self._source: tuple[KeyValue, jax.Array] | None = None
        self._cache: KeyValue | None = None

    def start(self, source_BR: Tokens, segments_BR: Tokens, token: int) -> NDArray[np.float32]:
        """Logits (B, V) after the first token of every target."""
        memory, segments, self._cache = self._encode(self._params, source_BR, segments_BR)
        self._source, self._length = (memory, segments), 0
        rows = source_BR.shape[0] * self._beams
        return self.advance(np.full(rows, token, np.int32), np.arange(rows, dtype=np.int32))[:: self._beams]

    def advance(self, tokens_N: Tokens, parents_N: Tokens) -> NDArray[np.float32]:
        """Logits (N, V) after one more token of every target, each of which goes on from what target `parents` was."""
        if self._source is None or self._cache is None:
            raise ValueError("start comes before advance")
        if self._length >= self._max_length:
            raise ValueError(f"the targets already have the {self._max_length} tokens this translator was made for")
        offset = np.asarray(self._length, np.int32)
        logits, self._cache = self._run(self._params, tokens_N, parents_N, offset, self._cache, *self._source)
        self._length += 1
        return np.asarray(logits)

    def _encoded(self, params: Params, source_BR: jax.Array, segments_BR: jax.Array) -> tuple[KeyValue, jax.Array, KeyValue]:
        """Keys and values of the sources, their segments, both for every target, and an empty cache."""
        model = self._network.bind(params)
        memory = model.memory(model.encode(source_BR, segments_BR))
        repeated = KeyValue(*(jnp.repeat(part, self._beams, axis=1) for part in memory))
        rows = source_BR.shape[0] * self._beams
        cache = empty_cache(self._spec, self._network.runtime.policy, rows, self._max_length)
        return repeated, jnp.repeat(segments_BR, self._beams, axis=0), cache

    def _advanced(
        self,
        params: Params,
        tokens_N: jax.Array,
        parents_N: jax.Array,
        offset: jax.Array,
        cache: KeyValue,
        memory: KeyValue,
        segments_NR: jax.Array,
    ) -> tuple[jax.Array, KeyValue]:
        cache = KeyValue(*(jnp.take(part, parents_N, axis=1) for part in cache))
        last = jnp.zeros((), jnp.int32)
        logits_NV, cache = self._network.bind(params).decode(tokens_N[:, None], offset, last, cache, memory, segments_NR)
        return logits_NV.astype(np.float32), cache
