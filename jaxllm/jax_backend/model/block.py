"""One layer: attention and MLP, each beside its norms and added to the residual stream.  B batch, S sequence, E hidden."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.jax_backend.model.attention import Attention, CacheT, Context, KeyValue
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.experts import Experts, Routing
from jaxllm.jax_backend.model.mlp import Mlp
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.runtime import Runtime


class Block(nnx.Module):
    """A Transformer layer with its norms where `NormSpec.place` puts them; between attention and MLP it may read a source."""

    def __init__(self, spec: ModelSpec, runtime: Runtime, cross: AttentionSpec | None = None) -> None:
        """cross: how it attends to the source, in a decoder with an encoder."""

        def norm(wanted: bool) -> Norm | None:
            return Norm(spec.norm, (spec.hidden_size,), ("embed",), runtime) if wanted else None

        self.attention_norm = norm(spec.norm.before)
        self.attention = Attention(spec.attention, spec.norm, spec.hidden_size, runtime)
        self.attention_output_norm = norm(spec.norm.after)
        self.attention_residual_norm = norm(spec.norm.of_residual)
        self.cross = cross
        self.cross_attention_norm = norm(cross is not None)
        self.cross_attention = None if cross is None else Attention(cross, spec.norm, spec.hidden_size, runtime)
        self.mlp_norm = norm(spec.norm.before)
        self.mlp: Mlp | Experts = (Mlp if spec.mlp.experts is None else Experts)(spec.mlp, spec.hidden_size, runtime)
        self.mlp_output_norm = norm(spec.norm.after)
        self.mlp_residual_norm = norm(spec.norm.of_residual)
        self.residual_dropout = spec.residual_dropout
        self.layout = runtime.layout

    def __call__(
        self, x_BSE: jax.Array, attention: AttentionSpec, context: Context, cache: CacheT, memory: KeyValue | None = None
    ) -> tuple[jax.Array, CacheT, Routing | None]:
        """attention: this layer's own.  memory: keys and values of the source, where they are known.

        Routing: where there are experts, of the tokens that are not padding.
        """
        rate, tap, key, index_S = self.residual_dropout, context.tap, context.key, context.visibility.query_index
        normed_BSE = x_BSE if self.attention_norm is None else tap("attention_norm", self.attention_norm(x_BSE))
        attended_BSE, cache = self.attention(normed_BSE, attention, context, cache)
        attended_BSE = tap("attention_output", attended_BSE)
        if self.attention_output_norm is not None:
            attended_BSE = tap("attention_output_norm", self.attention_output_norm(attended_BSE))
        x_BSE = x_BSE + token_dropout(attended_BSE, rate, key, Site.ATTENTION_OUTPUT, index_S)
        x_BSE = tap("attention_residual", self.layout.constrain(x_BSE, "batch", "residual", "hidden"))
        if self.attention_residual_norm is not None:
            x_BSE = tap("attention_residual_norm", self.attention_residual_norm(x_BSE))
        if self.cross_attention is not None:
            x_BSE = self._across(x_BSE, context, memory)
        normed_BSE = x_BSE if self.mlp_norm is None else tap("mlp_norm", self.mlp_norm(x_BSE))
        fed_BSE, routing = self._feed(normed_BSE, context)
        fed_BSE = tap("mlp_output", fed_BSE)
        if self.mlp_output_norm is not None:
            fed_BSE = tap("mlp_output_norm", self.mlp_output_norm(fed_BSE))
        x_BSE = x_BSE + token_dropout(fed_BSE, rate, key, Site.MLP_OUTPUT, index_S)
        if self.mlp_residual_norm is not None:
            x_BSE = self.mlp_residual_norm(tap("mlp_residual", x_BSE))
        return tap("residual", self.layout.constrain(x_BSE, "batch", "residual", "hidden")), cache, routing

    def _across(self, x_BSE: jax.Array, context: Context, memory: KeyValue | None) -> jax.Array:
        """The residual stream with what attention to the source adds to it."""
        if self.cross_attention is None or self.cross is None or self.cross_attention_norm is None:
            raise ValueError("this layer reads no source")
        tap, index_S = context.tap, context.visibility.query_index
        normed_BSE = tap("cross_attention_norm", self.cross_attention_norm(x_BSE))
        read_BSE = tap("cross_attention_output", self.cross_attention.across(normed_BSE, self.cross, context, memory))
        x_BSE = x_BSE + token_dropout(read_BSE, self.residual_dropout, context.key, Site.CROSS_ATTENTION_OUTPUT, index_S)
        return tap("cross_attention_residual", self.layout.constrain(x_BSE, "batch", "residual", "hidden"))

    def _feed(self, x_BSE: jax.Array, context: Context) -> tuple[jax.Array, Routing | None]:
        if isinstance(self.mlp, Mlp):
            return self.mlp(x_BSE, context.key, context.visibility.query_index), None
        segments_BS = context.visibility.query_segments
        return self.mlp(x_BSE, None if segments_BS is None else segments_BS > 0, context.tap)
