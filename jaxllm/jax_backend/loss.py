"""Token cross-entropy.  B batch, S sequence, V vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.jax_backend.precision import Policy


def token_loss_sum(logits_BSV: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array, policy: Policy) -> jax.Array:
    """Sum over tokens of weight * (logsumexp(logits) - logit of the target), in nats, in the statistics dtype.

    The target's logit is picked by comparison rather than by index: a gather would collect logits that are sharded over the
    vocabulary, and its gradient is a scatter.
    """
    logits_BSV = logits_BSV.astype(policy.statistics)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_BSV.shape, logits_BSV.ndim - 1)
    zero = jnp.zeros((), policy.statistics)
    picked_BS = jnp.sum(jnp.where(vocabulary == targets_BS[..., None], logits_BSV, zero), axis=-1)
    losses_BS = jax.nn.logsumexp(logits_BSV, axis=-1) - picked_BS
    return jnp.sum(losses_BS * weights_BS.astype(policy.statistics))
