"""What makes outputs of the last hidden states.

Shape legend: B batch, S sequence, E hidden, V vocabulary, L outputs of a classification.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.spec import HeadSpec, ModelSpec
from jaxllm.jax_backend.model.dropout import Site, dropout
from jaxllm.jax_backend.model.linear import Linear
from jaxllm.jax_backend.model.mlp import ACTIVATIONS
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.parameter import parameter
from jaxllm.jax_backend.model.runtime import Runtime


class Projection(NamedTuple):
    """What the logits of a language model are made of: x_BSE times `weight`, which has the logical axes `axes`, plus a bias."""

    x: jax.Array
    weight: jax.Array
    axes: tuple[str, ...]
    bias: jax.Array | None


class MaskedLmHead(nnx.Module):
    """A dense layer and a norm before the token embeddings, and a bias for every token after them (arXiv:1810.04805)."""

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        hidden = spec.hidden_size
        self.dense = Linear((hidden, hidden), ("embed", "embed_out"), bias=True, runtime=runtime)
        self.norm = Norm(spec.norm, (hidden,), ("embed",), runtime)
        self.bias = parameter((runtime.layout.vocabulary(spec),), ("vocab",), runtime)
        self.activation = spec.head.dense or "gelu"

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """What is compared with the token embeddings, (B, S, E)."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x_BSE)))


class ClassificationHead(nnx.Module):
    """Outputs for every token, or for the one token of a row that stands for it."""

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        hidden, head = spec.hidden_size, spec.head
        self.dense = (
            None if head.dense is None else Linear((hidden, hidden), ("embed", "embed_out"), bias=True, runtime=runtime)
        )
        self.output = Linear((hidden, head.outputs), ("embed", "label"), bias=head.bias, runtime=runtime)
        self.spec = head

    def __call__(self, x_BSE: jax.Array, last_B: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """(B, S, L), or (B, 1, L).  last: see `last_token`.  key: of dropout, if there is any."""
        spec = self.spec
        if spec.pool == "first":
            x_BSE = x_BSE[:, :1]
        if last_B is not None:
            x_BSE = _picked(x_BSE, last_B)
        if self.dense is not None and spec.dense is not None:
            if spec.dropout_before_dense:
                x_BSE = dropout(x_BSE, spec.dropout, key, Site.HEAD_DENSE)
            x_BSE = ACTIVATIONS[spec.dense](self.dense(x_BSE))
        return self.output(dropout(x_BSE, spec.dropout, key, Site.HEAD))


def last_token(spec: HeadSpec, tokens_BS: jax.Array, segments_BS: jax.Array) -> jax.Array | None:
    """(B,) where the token stands that a row is judged by; None: it is not the last one.

    As transformers finds it, from the right the first token that is not the padding token, also where a text ends in one.
    """
    if spec.pool != "last":
        return None
    is_text_BS = segments_BS > 0
    if spec.padding is not None:
        is_text_BS &= tokens_BS != spec.padding
    return jnp.max(jnp.where(is_text_BS, jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), 0), axis=1)


def _picked(x_BSE: jax.Array, index_B: jax.Array) -> jax.Array:
    """(B, 1, E), by comparison rather than by index, whose gradient would be a scatter."""
    is_it_BS = jnp.arange(x_BSE.shape[1], dtype=jnp.int32) == index_B[:, None]
    return jnp.sum(jnp.where(is_it_BS[..., None], x_BSE, jnp.zeros((), x_BSE.dtype)), axis=1, keepdims=True)


def build_head(spec: ModelSpec, runtime: Runtime) -> Linear | MaskedLmHead | ClassificationHead | None:
    """The head of a model; None for a language model whose outputs are compared with its token embeddings alone."""
    if spec.head.kind == "masked-lm":
        return MaskedLmHead(spec, runtime)
    if spec.head.kind in ("sequence-classification", "token-classification"):
        return ClassificationHead(spec, runtime)
    if spec.tie_embeddings:
        return None
    return Linear((spec.hidden_size, runtime.layout.vocabulary(spec)), ("embed", "vocab"), bias=False, runtime=runtime)
