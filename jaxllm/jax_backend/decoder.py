"""Next-token logits of one sequence with a key/value cache.  V vocabulary, T cache length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from numpy.typing import NDArray

from jaxllm.families.spec import ModelSpec
from jaxllm.jax_backend.attention import xla_attention
from jaxllm.jax_backend.model.attention import KeyValue
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.transformer import empty_cache
from jaxllm.jax_backend.network import Params, build_network
from jaxllm.jax_backend.sharding import Layout

SMALLEST_BUCKET = 16


class JaxDecoder:
    """The decoder of one set of weights; compiled once per prompt bucket and once for single tokens.

    Parameters stay sharded as they are; the one sequence is replicated over the data-parallel devices.
    """

    def __init__(self, spec: ModelSpec, runtime: Runtime, params: Mapping[str, jax.Array], max_length: int) -> None:
        layout = Layout(runtime.layout.mesh, replicated=frozenset({"batch", "sequence", "residual"}))
        self._network = build_network(spec, replace(runtime, layout=layout, remat="none", attention=xla_attention))
        self._params = jax.jit(self._network.cast)(dict(params))
        self._max_length = max_length
        self._length = 0
        cache_sharding = layout.sharding("layers", "batch", None, "kv_heads", None)
        self._empty = jax.jit(lambda: empty_cache(spec, runtime.policy, 1, max_length), out_shardings=cache_sharding)
        self._run = jax.jit(self._forward, donate_argnums=(4,), out_shardings=(layout.whole, cache_sharding))
        self._cache: KeyValue | None = None

    def _forward(
        self, params: Params, tokens: jax.Array, offset: jax.Array, last: jax.Array, cache: KeyValue
    ) -> tuple[jax.Array, KeyValue]:
        logits_BV, cache = self._network.bind(params).decode(tokens, offset, last, cache)
        return logits_BV[0].astype(np.float32), cache

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits (V,) after the prompt, which starts the sequence anew.

        The prompt is padded to a power of two; what the padding leaves in the cache is overwritten before it is ever seen.
        """
        if not 1 <= len(tokens) <= self._max_length:
            raise ValueError(f"a prompt of {len(tokens)} tokens does not fit a decoder for 1 to {self._max_length} tokens")
        bucket = min(max(SMALLEST_BUCKET, 1 << (len(tokens) - 1).bit_length()), self._max_length)
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(tokens)] = tokens
        self._cache = self._empty()
        logits = self._advance(padded, offset=0, last=len(tokens) - 1)
        self._length = len(tokens)
        return logits

    def decode(self, token: int) -> NDArray[np.float32]:
        """Logits (V,) after one more token."""
        if self._cache is None:
            raise ValueError("prefill comes before decode")
        if self._length >= self._max_length:
            raise ValueError(f"the sequence already has the {self._max_length} tokens this decoder was made for")
        logits = self._advance(np.asarray([[token]], np.int32), offset=self._length, last=0)
        self._length += 1
        return logits

    def _advance(self, tokens: NDArray[np.int32], offset: int, last: int) -> NDArray[np.float32]:
        logits, self._cache = self._run(
            self._params, tokens, np.asarray(offset, np.int32), np.asarray(last, np.int32), self._cache
        )
        return np.asarray(logits)
