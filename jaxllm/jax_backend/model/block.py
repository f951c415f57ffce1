"""One layer: norm, attention, residual, norm, MLP, residual.  B batch, S sequence, E hidden."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.families.spec import ModelSpec
from jaxllm.jax_backend.model.attention import Attention, CacheT, Context
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.mlp import Mlp
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.runtime import Runtime


class Block(nnx.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        self.attention_norm = Norm(spec.norm, spec.hidden_size, runtime)
        self.attention = Attention(spec.attention, spec.hidden_size, runtime)
        self.mlp_norm = Norm(spec.norm, spec.hidden_size, runtime)
        self.mlp = Mlp(spec.mlp, spec.hidden_size, runtime)
        self.residual_dropout = spec.residual_dropout
        self.layout = runtime.layout

    def __call__(self, x_BSE: jax.Array, context: Context, cache: CacheT) -> tuple[jax.Array, CacheT]:
        rate, tap, index_S = self.residual_dropout, context.tap, context.visibility.query_index
        normed_BSE = tap("attention_norm", self.attention_norm(x_BSE))
        attended_BSE, cache = self.attention(normed_BSE, context, cache)
        attended_BSE = tap("attention_output", attended_BSE)
        x_BSE = x_BSE + token_dropout(attended_BSE, rate, context.key, Site.ATTENTION_OUTPUT, index_S)
        x_BSE = tap("attention_residual", self.layout.constrain(x_BSE, "batch", "residual", "hidden"))
        normed_BSE = tap("mlp_norm", self.mlp_norm(x_BSE))
        fed_BSE = tap("mlp_output", self.mlp(normed_BSE))
        x_BSE = x_BSE + token_dropout(fed_BSE, rate, context.key, Site.MLP_OUTPUT, index_S)
        return tap("residual", self.layout.constrain(x_BSE, "batch", "residual", "hidden")), cache
