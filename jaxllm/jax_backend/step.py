"""The training step and the evaluation step: pure functions of parameters, moments and a batch, compiled once.

Shape legend: A micro-batches (accumulation), B sequences of one micro-batch over all devices, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from jaxllm.config.schema import OptimizerConfig
from jaxllm.jax_backend import loss as losses
from jaxllm.jax_backend.compiler_options import compiler_options
from jaxllm.jax_backend.model.dropout import step_key
from jaxllm.jax_backend.model.experts import Routing, no_routing
from jaxllm.jax_backend.model.tap import NO_TAP, Tap
from jaxllm.jax_backend.model.transformer import Text
from jaxllm.jax_backend.network import Network, Params
from jaxllm.jax_backend.offload import Storage, storage_of, updated_in_turn
from jaxllm.jax_backend.optimizer import NO_RATES, Moments, StepScalars, clip_factor


class DeviceBatch(NamedTuple):
    """A global batch on the devices, (A, B, S) or (A, B, T) each; fields as in `jaxllm.data.batch.Batch`."""

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array
    positions: jax.Array
    segments: jax.Array
    token_types: jax.Array | None = None
    source: jax.Array | None = None
    source_segments: jax.Array | None = None

    @property
    def text(self) -> Text:
        """What the model reads."""
        return Text(self.inputs, self.positions, self.segments, self.token_types, self.source, self.source_segments)


class StepMetrics(NamedTuple):
    """Of the global batch.

    loss: mean over target tokens.  gradient_norm: before clipping.  target_tokens: sum of weights.  statistics: of routers,
    where there are experts.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    target_tokens: jax.Array
    statistics: dict[str, jax.Array]


TrainStep = Callable[
    [Params, Moments[jax.Array], DeviceBatch, StepScalars, Any], tuple[Params, Moments[jax.Array], StepMetrics]
]
EvaluationStep = Callable[[Params, DeviceBatch], tuple[jax.Array, jax.Array, jax.Array | None]]


def loss_sum(
    network: Network, params: Mapping[str, jax.Array], micro: DeviceBatch, key: jax.Array | None, tap: Tap = NO_TAP
) -> jax.Array:
    """Sum of weighted token losses of one micro-batch; params as they are used, in the compute dtype."""
    return _routed_loss_sum(network, params, micro, key, tap)[0]


def _routed_loss_sum(
    network: Network, params: Mapping[str, jax.Array], micro: DeviceBatch, key: jax.Array | None, tap: Tap
) -> tuple[jax.Array, Routing | None]:
    model = network.bind(params)
    hidden = model.hidden(micro.text, key, tap)
    return losses.model_loss_sum(model, hidden, micro.targets, micro.weights), hidden.routing


def forward(
    network: Network, params: Mapping[str, jax.Array], micro: DeviceBatch, key: jax.Array | None, tap: Tap = NO_TAP
) -> jax.Array:
    """Outputs (B, T, L) of one micro-batch; params as they are used, in the compute dtype."""
    return network.bind(params)(micro.text, key, tap)


def objective(
    network: Network, params: Mapping[str, jax.Array], micro: DeviceBatch, key: jax.Array | None, tap: Tap = NO_TAP
) -> tuple[jax.Array, Routing | None]:
    """What training makes smaller, and what the routers did if there are any.

    Their load-balancing loss is one number for the whole micro-batch, as in transformers; it weighs as much as the target
    tokens beside which it stands.
    """
    loss, routing = _routed_loss_sum(network, params, micro, key, tap)
    experts = network.spec.mlp.experts
    if routing is not None and experts is not None and experts.balance:
        loss += experts.balance * routing.balance_loss() * jnp.sum(micro.weights.astype(loss.dtype))
    return loss, routing


def loss_and_gradients(
    network: Network,
    shardings: Mapping[str, NamedSharding],
    params: Params,
    batch: DeviceBatch,
    key_of: Callable[[jax.Array], jax.Array | None],
    rates: Mapping[str, NDArray[np.float64]] = NO_RATES,
) -> tuple[StepMetrics, Params]:
    """Mean loss over the global batch and its gradients, accumulated over micro-batches in the statistics dtype.

    The number of target tokens is known before the first micro-batch, so each contributes its exact share whatever its size.
    key_of: the dropout key of a micro-batch.  rates: see `adamw`; what is 0 is frozen and has no gradient.
    """
    statistics = network.runtime.policy.statistics
    used = network.cast(params)
    tokens = jnp.sum(batch.weights.astype(statistics))

    def one(index: jax.Array, micro: DeviceBatch) -> tuple[jax.Array, Routing | None, Params]:
        # Weighed by its share from the start: a loss in chunks has its gradients before the loss is there to be divided.
        share = micro._replace(weights=micro.weights.astype(statistics) / tokens)

        def of_share(values: Params) -> tuple[jax.Array, Routing | None]:
            return objective(network, values, share, key_of(index))

        (loss, routing), gradients = jax.value_and_grad(of_share, has_aux=True)(used)
        gradients = {path: _constrain(gradient.astype(statistics), shardings[path]) for path, gradient in gradients.items()}
        return loss, routing, gradients

    if batch.inputs.shape[0] == 1:
        loss, routing, gradients = one(jnp.zeros((), jnp.int32), jax.tree.map(lambda leaf: leaf[0], batch))
    else:
        zeros = {path: _constrain(jnp.zeros(leaf.shape, statistics), shardings[path]) for path, leaf in used.items()}
        add = lambda total, inputs: (jax.tree.map(jnp.add, total, one(*inputs)), None)  # noqa: E731
        numbers = jnp.arange(batch.inputs.shape[0], dtype=jnp.int32)
        nothing = (jnp.zeros((), statistics), no_routing(network.spec, statistics), zeros)
        (loss, routing, gradients), _ = jax.lax.scan(add, nothing, (numbers, batch))
    for path, rate in rates.items():
        if not np.all(rate):
            gradients[path] = jnp.where(jnp.asarray(rate == 0.0), jnp.zeros((), statistics), gradients[path])
    norm = jnp.sqrt(sum((jnp.sum(gradient * gradient) for gradient in gradients.values()), jnp.zeros((), statistics)))
    return StepMetrics(loss, norm, tokens, {} if routing is None else routing.statistics()), gradients


def _constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return x if sharding.mesh.size == 1 else jax.lax.with_sharding_constraint(x, sharding)


def build_train_step(
    network: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    config: OptimizerConfig,
    shardings: Mapping[str, NamedSharding],
    seed: int,
    storage: Storage | None = None,
    rates: Mapping[str, NDArray[np.float64]] = NO_RATES,
) -> TrainStep:
    """One compiled step; parameters and moments are donated and come back to where they were.

    shardings: of parameters and gradients while they are computed with.  storage: where parameters and moments are kept, if
    not there.  rates: see `adamw`.

    When loss or gradient norm is not finite, parameters and moments come back as they were.
    """
    has_dropout = network.spec.has_dropout

    storage = storage or storage_of(shardings, "none")
    is_offloaded = storage.moments != dict(shardings)

    def step(
        params: Params, moments: Moments[jax.Array], batch: DeviceBatch, scalars: StepScalars, index: jax.Array
    ) -> tuple[Params, Moments[jax.Array], StepMetrics]:
        key_of = lambda micro: step_key(seed, index, micro) if has_dropout else None  # noqa: E731
        metrics, gradients = loss_and_gradients(network, shardings, params, batch, key_of, rates)
        factor = clip_factor(metrics.gradient_norm, config.clip_norm)
        gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.gradient_norm)

        def update(gradients: Params, params: Params, moments: Moments[jax.Array]) -> tuple[Params, Moments[jax.Array]]:
            updates, new_moments = optimizer.update(gradients, moments, params, scalars=scalars, finite=finite)
            return optax.apply_updates(params, updates), new_moments

        if is_offloaded:
            return *updated_in_turn(update, gradients, params, moments, storage, finite), metrics
        return *update(gradients, params, moments), metrics

    whole = network.runtime.layout.whole
    out_shardings = (storage.params, Moments(storage.moments, storage.moments), whole)
    options = compiler_options(network.runtime.layout.mesh)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings, compiler_options=options)


def build_evaluation_step(network: Network, *, outputs: bool = False) -> EvaluationStep:
    """Sum of weighted losses, sum of weights and, if wanted, the outputs (A, B, T, L) of one global batch, without dropout."""
    policy = network.runtime.policy

    def step(params: Params, batch: DeviceBatch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        used = network.cast(params)

        def one(micro: DeviceBatch) -> tuple[jax.Array, jax.Array | None]:
            if not outputs:
                return loss_sum(network, used, micro, None), None
            logits = forward(network, used, micro, None)
            loss = losses.loss_sum(network.spec.head.loss, logits, micro.targets, micro.weights, policy)
            return loss, logits.astype(policy.statistics)

        sums, found = jax.lax.map(one, batch)
        return jnp.sum(sums), jnp.sum(batch.weights.astype(policy.statistics)), found

    whole = network.runtime.layout.whole
    return jax.jit(step, out_shardings=(whole, whole, whole if outputs else None))
