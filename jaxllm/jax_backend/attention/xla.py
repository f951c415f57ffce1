"""Attention in plain XLA operations: runs on every platform, in every precision, with every feature of a spec.

Shape legend: B batch, S queries, T keys, H heads, K key/value heads, G = H / K queries per key, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility, visible
from jaxllm.jax_backend.model.dropout import Site, dropout
from jaxllm.jax_backend.remat import ATTENTION_MIXED, named

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime


def xla_attention(
    query_BSHD: jax.Array,
    key_BTKD: jax.Array,
    value_BTKD: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """As `AttentionKernel`.

    Written out because `jax.nn.dot_product_attention` computes its softmax in float32 even for float64.  Heads come first in
    both products, so that they are plain batched matrix products; left in between, they cost twice the time on a CPU.
    """
    policy = runtime.policy
    batch, queries, heads, head_dim = query_BSHD.shape
    groups = heads // key_BTKD.shape[2]
    query_BKGSD = query_BSHD.reshape(batch, queries, -1, groups, head_dim).transpose(0, 2, 3, 1, 4)
    key_BKTD, value_BKTD = key_BTKD.transpose(0, 2, 1, 3), value_BTKD.transpose(0, 2, 1, 3)
    scores_BKGST = jnp.einsum(
        "bkgsd,bktd->bkgst", query_BKGSD, key_BKTD, precision=policy.matmul, preferred_element_type=policy.statistics
    )
    scores_BKGST = scores_BKGST * spec.scale
    if spec.softcap is not None:
        scores_BKGST = jnp.tanh(scores_BKGST / spec.softcap) * spec.softcap
    if visibility.bias is not None:
        scores_BKGST += visibility.bias.reshape(-1, groups, *scores_BKGST.shape[3:]).astype(policy.statistics)
    lowest = np.finfo(policy.statistics).min
    scores_BKGST = jnp.where(visible(visibility, spec)[:, None, None], scores_BKGST, lowest)
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(policy.compute)
    weights_BKGST = dropout(weights_BKGST, spec.dropout, dropout_key, Site.ATTENTION)
    mixed_BKGSD = jnp.einsum("bkgst,bktd->bkgsd", weights_BKGST, value_BKTD, precision=policy.matmul)
    return named(mixed_BKGSD.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim), ATTENTION_MIXED)
