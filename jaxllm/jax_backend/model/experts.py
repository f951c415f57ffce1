"""Many MLPs behind a router: every token goes through the few it gives the most weight, and none is dropped.

Tokens are sorted by expert, so that a product with every expert's own kernel is one `grouped_dot`.  Where experts are spread
over devices, each device gathers the tokens of its expert group, computes its own experts for all of them, and hands back each
token's sum: shapes are fixed whatever the router decides.

Shape legend: B batch, S sequence, E hidden, X experts, K experts per token, M size of an expert, T tokens, A = T K assignments.
"""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.families.spec import MlpSpec, ModelSpec
from jaxllm.jax_backend.cuts import LOGICAL_AXES
from jaxllm.jax_backend.model.grouped import grouped_dot, row_tile
from jaxllm.jax_backend.model.linear import Linear
from jaxllm.jax_backend.model.mlp import ACTIVATIONS
from jaxllm.jax_backend.model.parameter import parameter
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.tap import NO_TAP, Tap
from jaxllm.metrics.routing import BALANCE_LOSS, ENTROPY, LARGEST_LOAD, SMALLEST_LOAD

CHOSEN: Final = "chosen_experts"
"""What a tap sees of a router's decision: numbers of experts, which have no gradient and are no point of `jaxllm.probe`."""


class Routing(NamedTuple):
    """What routers did with the tokens of a batch, padding left out; sums over tokens, and over layers once they are added up.

    chosen_X: how often each expert was chosen.  probability_X: what the router gave it.  entropy: of its probabilities, in
    nats.  tokens: how many it decided on.
    """

    chosen: jax.Array
    probability: jax.Array
    entropy: jax.Array
    tokens: jax.Array

    def balance_loss(self) -> jax.Array:
        """The load-balancing loss (arXiv:2101.03961, equations 4 to 6), as transformers takes it: over all layers at once.

        It is K where all experts are chosen and weighted alike, and grows as they are not.
        """
        tokens = jnp.maximum(self.tokens, 1.0)
        shares = jax.lax.stop_gradient(self.chosen) / tokens
        return jnp.sum(shares * self.probability / tokens) * self.chosen.shape[-1]

    def statistics(self) -> dict[str, jax.Array]:
        """What is reported of a batch, by the names of `jaxllm.metrics.routing`."""
        shares_X = self.chosen / jnp.maximum(jnp.sum(self.chosen), 1.0) * self.chosen.shape[-1]
        return {
            BALANCE_LOSS: self.balance_loss(),
            LARGEST_LOAD: jnp.max(shares_X),
            SMALLEST_LOAD: jnp.min(shares_X),
            ENTROPY: self.entropy / jnp.maximum(self.tokens, 1.0),
        }


def no_routing(spec: ModelSpec, dtype: np.dtype) -> Routing | None:
    """Sums over no token; None where there are no experts."""
    if spec.mlp.experts is None:
        return None
    zeros_X, zero = jnp.zeros(spec.mlp.experts.count, dtype), jnp.zeros((), dtype)
    return Routing(zeros_X, zeros_X, zero, zero)


class Experts(nnx.Module):
    """A router and its experts, whose kernels are stacked."""

    def __init__(self, spec: MlpSpec, hidden: int, runtime: Runtime) -> None:
        experts = spec.experts
        if experts is None:
            raise ValueError("a spec without experts; use Mlp")
        inward, outward = (experts.count, hidden, spec.size), (experts.count, spec.size, hidden)
        self.router = Linear((hidden, experts.count), ("embed", "router"), bias=False, runtime=runtime)
        self.gate = Kernels(inward, ("experts", "embed", "mlp"), runtime)
        self.up = Kernels(inward, ("experts", "embed", "mlp"), runtime)
        self.down = Kernels(outward, ("experts", "mlp", "embed"), runtime)
        self.spec = experts
        self.activation = spec.activation
        self.runtime = runtime

    def __call__(self, x_BSE: jax.Array, counts_BS: jax.Array | None, tap: Tap = NO_TAP) -> tuple[jax.Array, Routing | None]:
        """counts_BS: which tokens count in what is reported; None: nothing is reported."""
        constrain, policy = self.runtime.layout.constrain, self.runtime.policy
        x_BSE = constrain(x_BSE, "batch", "sequence", "hidden")
        logits_BSX = tap("router", constrain(self.router(x_BSE), "batch", "sequence", None)).astype(policy.statistics)
        probabilities_BSX = jax.nn.softmax(logits_BSX, axis=-1)
        weights_BSK, chosen_BSK = jax.lax.top_k(probabilities_BSX, self.spec.per_token)
        chosen_BSK = tap(CHOSEN, chosen_BSK)
        if self.spec.normalised:
            weights_BSK = weights_BSK / jnp.sum(weights_BSK, axis=-1, keepdims=True)
        if self.spec.rounds_weights:
            weights_BSK = weights_BSK.astype(policy.compute)
        y_BSE = self._spread(x_BSE, weights_BSK, chosen_BSK)
        routing = None if counts_BS is None else _routing(logits_BSX, probabilities_BSX, chosen_BSK, counts_BS)
        return constrain(y_BSE, "batch", "residual", "hidden"), routing

    def _spread(self, x_BSE: jax.Array, weights_BSK: jax.Array, chosen_BSK: jax.Array) -> jax.Array:
        """The experts' outputs, on however many devices they are."""
        layout = self.runtime.layout
        kernels = (self.gate.kernel[...], self.up.kernel[...], self.down.kernel[...])
        if layout.mesh.size == 1:
            return self._mixed(x_BSE, weights_BSK, chosen_BSK, *kernels, groups=1, is_split=False)
        tokens = layout.spec("batch", "sequence", None)
        inward, outward = layout.spec("experts", None, "mlp"), layout.spec("experts", "mlp", None)
        sharded = jax.shard_map(
            partial(self._mixed, groups=layout.mesh.shape["expert"], is_split=True),
            mesh=layout.mesh,
            in_specs=(tokens, tokens, tokens, inward, inward, outward),
            out_specs=PartitionSpec(*tokens),
            check_vma=False,
        )
        mixed: jax.Array = sharded(x_BSE, weights_BSK, chosen_BSK, *kernels)
        return mixed

    def _mixed(
        self,
        x_BSE: jax.Array,
        weights_BSK: jax.Array,
        chosen_BSK: jax.Array,
        gate_XEM: jax.Array,
        up_XEM: jax.Array,
        down_XME: jax.Array,
        *,
        groups: int,
        is_split: bool,
    ) -> jax.Array:
        """One device's part.  groups: devices that experts are spread over."""
        spread, replicated = ("expert",), "batch" in self.runtime.layout.replicated
        gathers = groups > 1 and not replicated
        if gathers:
            x_BSE, weights_BSK, chosen_BSK = (
                jax.lax.all_gather(each, spread, axis=0, tiled=True) for each in (x_BSE, weights_BSK, chosen_BSK)
            )
        local = gate_XEM.shape[0]
        first = jax.lax.axis_index(spread) * local if groups > 1 else 0
        y_BSE = self._local(x_BSE, weights_BSK, chosen_BSK - first, gate_XEM, up_XEM, down_XME)
        if gathers:
            y_BSE = jax.lax.psum_scatter(y_BSE, spread, scatter_dimension=0, tiled=True)
        elif groups > 1:
            y_BSE = jax.lax.psum(y_BSE, spread)
        return jax.lax.psum(y_BSE, LOGICAL_AXES["mlp"]) if is_split else y_BSE

    def _local(
        self,
        x_BSE: jax.Array,
        weights_BSK: jax.Array,
        chosen_BSK: jax.Array,
        gate_XEM: jax.Array,
        up_XEM: jax.Array,
        down_XME: jax.Array,
    ) -> jax.Array:
        """Each token's sum over the experts at hand; choices below 0 or from X on are of experts elsewhere."""
        policy, count, per_token = self.runtime.policy, gate_XEM.shape[0], self.spec.per_token
        chosen_A = chosen_BSK.reshape(-1)
        is_here_A = (chosen_A >= 0) & (chosen_A < count)
        # Assignments to experts elsewhere are sorted to the end, behind every group.
        sorted_A = jnp.argsort(jnp.where(is_here_A, chosen_A, count), stable=True)
        sizes_X = jnp.sum(chosen_A[:, None] == jnp.arange(count, dtype=chosen_A.dtype), axis=0, dtype=jnp.int32)
        is_filled_A1 = is_here_A[sorted_A][:, None]
        tile = self._gradient_tile(chosen_A.shape[0])
        dot = partial(grouped_dot, sizes_X=sizes_X, precision=policy.matmul, tile=tile)
        x_AE = jnp.where(is_filled_A1, x_BSE.reshape(-1, x_BSE.shape[-1])[sorted_A // per_token], 0)
        inner_AM = ACTIVATIONS[self.activation](dot(x_AE, gate_XEM)) * dot(x_AE, up_XEM)
        y_AE = dot(jnp.where(is_filled_A1, inner_AM, 0), down_XME)
        y_AE = jnp.where(is_filled_A1, y_AE * weights_BSK.reshape(-1)[sorted_A][:, None], 0).astype(policy.compute)
        places_A = jnp.argsort(sorted_A)  # where each assignment went
        return jnp.sum(y_AE[places_A].reshape(*x_BSE.shape[:2], per_token, -1), axis=2)

    def _gradient_tile(self, rows: int) -> int | None:
        """For `grouped_dot`: its kernel multiplies in bfloat16, and runs on TPUs."""
        is_tpu = self.runtime.layout.platform == "tpu"
        return row_tile(rows, self.spec.count) if is_tpu and self.runtime.policy.compute == jnp.bfloat16 else None


class Kernels(nnx.Module):
    """One kernel for every expert."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str, str], runtime: Runtime) -> None:
        self.kernel = parameter(shape, axes, runtime)


def _routing(logits_BSX: jax.Array, probabilities_BSX: jax.Array, chosen_BSK: jax.Array, counts_BS: jax.Array) -> Routing:
    counts_BS1 = counts_BS[..., None].astype(probabilities_BSX.dtype)
    experts_X = jnp.arange(probabilities_BSX.shape[-1], dtype=chosen_BSK.dtype)
    chosen_BSX = jnp.sum(chosen_BSK[..., None] == experts_X, axis=-2, dtype=probabilities_BSX.dtype)
    entropy_BS = -jnp.sum(probabilities_BSX * jax.nn.log_softmax(logits_BSX, axis=-1), axis=-1)
    return Routing(
        jnp.sum(chosen_BSX * counts_BS1, axis=(0, 1)),
        jnp.sum(probabilities_BSX * counts_BS1, axis=(0, 1)),
        jnp.sum(entropy_BS * counts_BS1[..., 0]),
        jnp.sum(counts_BS1),
    )
