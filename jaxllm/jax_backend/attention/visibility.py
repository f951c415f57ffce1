"""Which keys a query may see.

Shape legend: B batch, S queries, T keys, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxllm.families.spec import AttentionSpec


class Visibility(NamedTuple):
    """What decides, beside the layer's spec, which keys each query sees; the same for every layer of a forward pass.

    query_index_S, key_index_T (int32): place of each query and key in its row, which `causal` and `window` compare.
    query_segments_BS, key_segments_BT (int32): the document each belongs to, 0 for padding; a query sees only keys of its own
    segment.  None: one document and no padding.
    bias_HST: what is added to the scores; None: nothing.
    """

    query_index: jax.Array
    key_index: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    bias: jax.Array | None = None


def sequence_visibility(segments_BS: jax.Array, order_S: NDArray[np.int32]) -> Visibility:
    """Self-attention over whole rows.  order: which token of its row stands at each place (`Layout.token_order`)."""
    index_S = jnp.asarray(order_S)
    return Visibility(index_S, index_S, segments_BS, segments_BS)


def cache_visibility(offset: jax.Array, queries: int, length: int) -> Visibility:
    """Queries `offset`, `offset + 1`, ... over a cache of `length` keys, of which a causal layer sees those up to itself."""
    return Visibility(offset + jnp.arange(queries, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32))


def source_visibility(segments_BT: jax.Array, queries: int) -> Visibility:
    """Queries that all see the same keys: all of a source that are not padding (everything, where all is padding)."""
    batch, keys = segments_BT.shape
    has_text_B1 = jnp.any(segments_BT > 0, axis=1, keepdims=True)
    seen_BS = jnp.broadcast_to(has_text_B1.astype(jnp.int32), (batch, queries))
    query_index_S, key_index_T = jnp.arange(queries, dtype=jnp.int32), jnp.arange(keys, dtype=jnp.int32)
    return Visibility(query_index_S, key_index_T, seen_BS, (segments_BT > 0).astype(jnp.int32))


def visible(visibility: Visibility, spec: AttentionSpec) -> jax.Array:
    """The mask drawn, (B or 1, S, T): its segment, with `causal` nothing later, with `window` nothing that far back.

    A query sees at least itself, also if it is padding, so that no row of a softmax is empty.
    """
    index_S1, index_1T = visibility.query_index[:, None], visibility.key_index[None, :]
    seen_ST = index_S1 >= index_1T if spec.causal else jnp.ones((index_S1.size, index_1T.size), bool)
    if spec.window is not None:
        seen_ST &= index_S1 - index_1T < spec.window
    if visibility.query_segments is None or visibility.key_segments is None:
        return seen_ST[None]
    return (visibility.query_segments[:, :, None] == visibility.key_segments[:, None, :]) & seen_ST
