"""The encoder of an encoder-decoder (arXiv:1706.03762, section 3.1): the stack that reads a source.

Shape legend: B batch, R tokens of a source, E hidden, L layers of the decoder, K key/value heads, D head_dim.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.families.spec import EncoderSpec, ModelSpec
from jaxllm.jax_backend.attention import source_visibility
from jaxllm.jax_backend.model.attention import Context
from jaxllm.jax_backend.model.block import Block
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.norm import Norm
from jaxllm.jax_backend.model.parameter import stacked
from jaxllm.jax_backend.model.relative import RelativeBias
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.scan import run_layers
from jaxllm.jax_backend.model.tap import NO_TAP, Tap


class Encoder(nnx.Module):
    """Layers without a causal mask, and a norm behind them."""

    def __init__(self, spec: ModelSpec, encoder: EncoderSpec, runtime: Runtime) -> None:
        self.layers = stacked(lambda: Block(spec, runtime), len(encoder.attentions))
        self.final_norm = Norm(spec.norm, (spec.hidden_size,), ("embed",), runtime)
        relative = encoder.attentions[0].relative
        self.relative_bias = None if relative is None else RelativeBias(encoder.attentions[0], runtime)
        self.spec = spec
        self.encoder = encoder
        self.runtime = runtime

    def __call__(self, x_BRE: jax.Array, segments_BR: jax.Array, key: jax.Array | None = None, tap: Tap = NO_TAP) -> jax.Array:
        """What the decoder reads, (B, R, E).  x: the embedded source.  key: of dropout, if there is any."""
        length = x_BRE.shape[1]
        bias_HRR = None if self.relative_bias is None else self.relative_bias(length, length)
        visibility = source_visibility(segments_BR, length)._replace(bias=bias_HRR)
        x_BRE = tap("embedding", x_BRE)
        context = Context(visibility, {}, key, tap=tap)
        x_BRE, _, _ = run_layers(self.layers, self.encoder.attentions, x_BRE, context, None, self.runtime.remat)
        x_BRE = tap("final_norm", self.final_norm(x_BRE))
        return token_dropout(x_BRE, self.spec.final_dropout, key, Site.FINAL, visibility.query_index)
