"""Losses of tokens and of rows.  B batch, S sequence, T targets of a row, V vocabulary, L outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.config.loss_chunk import chunk_tokens
from jaxllm.families.spec import LossKind
from jaxllm.jax_backend.chunked_loss import Chunked, Head, Tokens, chunked_loss_sum
from jaxllm.jax_backend.model.tap import NO_TAP
from jaxllm.jax_backend.model.transformer import Hidden, Transformer
from jaxllm.jax_backend.precision import Policy


def model_loss_sum(model: Transformer, hidden: Hidden, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of weight * loss from what comes out of the model's last layer, in the statistics dtype.

    In chunks of tokens where the run asks for them (`training.loss_chunk`) and nobody looks at the logits.
    """
    spec, runtime = model.spec, model.runtime
    tokens = None if hidden.context.tap is not NO_TAP else _chunk_tokens(model, hidden.states)
    if tokens is None:
        return loss_sum(spec.head.loss, model.outputs(hidden), targets, weights, runtime.policy)
    projection = model.projection(hidden)
    chunked = Chunked(projection.axes, spec.vocab_size, spec.final_softcap, tokens, runtime)
    head = Head(projection.weight, projection.bias)
    return chunked_loss_sum(chunked, Tokens(projection.x, targets, weights), head)


def _chunk_tokens(model: Transformer, x_BSE: jax.Array) -> int | None:
    """Tokens of a chunk on one device; None: the loss is not cut, or the model has no vocabulary to choose from."""
    spec, layout = model.spec, model.runtime.layout
    if spec.head.kind not in ("causal-lm", "masked-lm"):
        return None
    tokens = x_BSE.shape[0] * x_BSE.shape[1] // layout.size("batch", "sequence")
    tpu = layout.platform == "tpu"
    vocabulary = -(-spec.vocab_size // layout.size("vocab"))
    return chunk_tokens(model.runtime.loss_chunk, tokens, vocabulary, hidden=spec.hidden_size, tpu=tpu)


def loss_sum(kind: LossKind, logits_BTL: jax.Array, targets: jax.Array, weights: jax.Array, policy: Policy) -> jax.Array:
    """Sum of weight * loss of one kind, in the statistics dtype.

    cross-entropy: logits (B, T, L) against labels (B, T).  binary-cross-entropy: logits (B, 1, L) against zeros and ones
    (B, L).  squared-error: outputs (B, 1, L) against values (B, L).
    """
    if kind == "cross-entropy":
        return token_loss_sum(logits_BTL, targets, weights, policy)
    x_BL, y_BL = logits_BTL[:, 0].astype(policy.statistics), targets.astype(policy.statistics)
    if kind == "squared-error":
        losses_BL = jnp.square(x_BL - y_BL)
    else:
        losses_BL = jnp.maximum(x_BL, 0) - x_BL * y_BL + jnp.log1p(jnp.exp(-jnp.abs(x_BL)))
    return jnp.sum(losses_BL * weights.astype(policy.statistics))


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
