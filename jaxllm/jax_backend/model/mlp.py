"""The feed-forward part of a layer: plain or gated (arXiv:2002.05202).  B batch, S sequence, E hidden, M inner size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.spec import Activation, MlpSpec
from jaxllm.jax_backend.model.dropout import Site, token_dropout
from jaxllm.jax_backend.model.linear import Linear
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.remat import named

# `gelu` is the exact, erf form (jax.nn.gelu's default is the tanh approximation).
ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


class Mlp(nnx.Module):
    """act(x gate) * (x up) down, or act(x up) down without a gate."""

    def __init__(self, spec: MlpSpec, hidden: int, runtime: Runtime) -> None:
        inward, outward = (hidden, spec.size), ("embed", "mlp")
        self.gate = Linear(inward, outward, spec.bias, runtime) if spec.gated else None
        self.up = Linear(inward, outward, spec.bias, runtime)
        self.down = Linear((spec.size, hidden), ("mlp", "embed"), spec.bias, runtime)
        self.activation = spec.activation
        self.dropout = spec.dropout
        self.runtime = runtime

    def __call__(self, x_BSE: jax.Array, key: jax.Array | None, index_S: jax.Array) -> jax.Array:
        """key: of dropout, if there is any.  index: which token of its row stands at each place."""
        constrain = self.runtime.layout.constrain
        activate = ACTIVATIONS[self.activation]
        x_BSE = constrain(x_BSE, "batch", "sequence", "hidden")
        inner_BSM = named(self.up(x_BSE), "mlp_up")
        gate_BSM = inner_BSM if self.gate is None else named(self.gate(x_BSE), "mlp_gate")
        inner_BSM = activate(gate_BSM) if self.gate is None else activate(gate_BSM) * inner_BSM
        inner_BSM = named(constrain(inner_BSM, "batch", "sequence", "mlp"), "mlp_inner")
        inner_BSM = token_dropout(inner_BSM, self.dropout, key, Site.MLP_INNER, index_S)
        return constrain(self.down(inner_BSM), "batch", "residual", "hidden")
