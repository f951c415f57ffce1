"""JaxProbe: the model of a run on one device, laid open point by point.

Everything is computed by the model, the loss and the training step that training uses; the probe only looks on.

Shape legend: A micro-batches, B sequences of one micro-batch, S tokens, V vocabulary, L layers, X experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from jaxllm.backend import Hyper
from jaxllm.config.batch import BatchPlan
from jaxllm.data.batch import Batch
from jaxllm.errors import BackendError
from jaxllm.jax_backend.assembly import assemble
from jaxllm.jax_backend.feed import BatchFeed
from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.model.experts import CHOSEN
from jaxllm.jax_backend.model.tap import LAYERS, Points, Recorder
from jaxllm.jax_backend.network import Network, Params
from jaxllm.jax_backend.optimizer import step_scalars
from jaxllm.jax_backend.process import configure_process
from jaxllm.jax_backend.step import DeviceBatch, TrainStep, forward, loss_and_gradients, objective
from jaxllm.jax_backend.weights import LiveWeights, load_params
from jaxllm.probe import Array, Choices, Pass, point_names
from jaxllm.run import Run
from jaxllm.state.training_state import TensorReader


class _Captured(NamedTuple):
    """Loss, gradients by Flax path, values and cotangents by point."""

    loss: jax.Array
    gradients: Params
    values: Points
    cotangents: Points


class _Routed(NamedTuple):
    """Of all layers: router logits (A, L, B, S, X) and chosen experts (A, L, B, S, K)."""

    logits: jax.Array
    chosen: jax.Array


@dataclass(frozen=True)
class _Loaded:
    """What `load` builds.  The functions compile when they are first called, once for each shape of a batch."""

    run: Run
    mesh: Mesh
    network: Network
    params: Params
    gradients: Callable[[Params, DeviceBatch], tuple[jax.Array, Params]]
    logits: Callable[[Params, DeviceBatch], tuple[jax.Array, _Routed | None]]
    capture: Callable[[Params, DeviceBatch], _Captured]
    zero_moments: Callable[[Params], Any]
    train_step: TrainStep


class JaxProbe:
    """One side of a comparison: the Flax model and the JAX training step.

    It runs on the first device of this process whatever the run's mesh, which changes where things are computed and not what.
    """

    name: Literal["jax"] = "jax"

    def __init__(self) -> None:
        self._state: _Loaded | None = None

    @property
    def _loaded(self) -> _Loaded:
        if self._state is None:
            raise BackendError("the JAX probe holds no model; call load first")
        return self._state

    def load(self, run: Run, params: TensorReader) -> None:
        """Build the model of `run` in its precision and fill it with `params` (Hugging Face names)."""
        configure_process(run.config)
        mesh = single_device_mesh()
        parts = assemble(_examined(run), mesh)
        network, shardings = parts.network, parts.shardings
        self._state = _Loaded(
            run=run,
            mesh=mesh,
            network=network,
            params=load_params(params, run.model.rules, shardings, network.runtime.policy.master),
            gradients=_build_gradients(network, shardings, parts.rates),
            logits=_build_logits(network),
            capture=_build_capture(network),
            zero_moments=jax.jit(parts.optimizer.init),
            train_step=parts.train_step,
        )

    def passes(self, batch: Batch, *, capture: bool = False, choices: Mapping[str, Choices] | None = None) -> Pass:
        """Forward and backward over all rows of a global batch, in micro-batches of `training.micro_batch` rows if that is set.

        capture: also record `values` and `cotangents`; the whole batch is then one micro-batch.  choices: None.
        """
        if choices is not None:
            raise BackendError("the routers of the JAX model choose for themselves; impose choices on the transformers model")
        loaded = self._loaded
        if capture:
            found = loaded.capture(loaded.params, self._place(batch, batch.rows))
            values = self._by_point(found.values)
            cotangents = self._by_point(found.cotangents)
            layers = found.values[LAYERS]
            routed = _Routed(layers["router"][None], layers[CHOSEN][None]) if CHOSEN in layers else None
            choices = _choices(routed, batch.rows)
            return Pass(float(found.loss), values["logits"], self._named(found.gradients), values, cotangents, choices)
        placed = self._place(batch, loaded.run.config.training.micro_batch)
        loss, gradients = loaded.gradients(loaded.params, placed)
        logits, routed = loaded.logits(loaded.params, placed)
        logits_BSV = _rows(_to_host(logits), batch.rows)
        return Pass(float(loss), logits_BSV, self._named(gradients), choices=_choices(routed, batch.rows))

    def after_step(self, batch: Batch, hyper: Hyper) -> Mapping[str, Array]:
        """The parameters after one optimiser step on `batch` from the loaded weights and zero moments, by Hugging Face name.

        When the loss or a gradient is not finite they are as they were, as in training.
        """
        loaded = self._loaded
        scalars = step_scalars(hyper, loaded.run.config.optimizer, loaded.network.runtime.policy.master)
        placed = self._place(batch, loaded.run.config.training.micro_batch)
        # The step takes over the memory of what it is given.
        params = jax.tree.map(jnp.copy, loaded.params)
        updated, _, _ = loaded.train_step(params, loaded.zero_moments(params), placed, scalars, np.uint32(0))
        return self._named(updated)

    def _place(self, batch: Batch, micro_batch: int | None) -> DeviceBatch:
        """(A, B, S), the last micro-batch filled up with rows of padding, which weigh nothing."""
        rows = min(micro_batch or batch.rows, batch.rows)
        return BatchFeed(self._loaded.mesh, BatchPlan(rows, -(-batch.rows // rows)))(batch)

    def _named(self, params: Params) -> dict[str, Array]:
        """Parameters or their gradients by Hugging Face name."""
        loaded = self._loaded
        reader = LiveWeights(params, loaded.run.model.rules, loaded.mesh)
        return {name: _to_host(reader.read(name)) for name in reader.names()}

    def _by_point(self, points: Points) -> dict[str, Array]:
        """What a recorder saw, under the names of `jaxllm.probe` and in forward order."""
        named = _by_name(points)
        return {point: named[point] for point in point_names(self._loaded.run.model.spec)}


def _by_name(points: Mapping[str, Any], stack: str = "") -> dict[str, Array]:
    """Every point, of every layer and stack, by its whole name."""
    named: dict[str, Array] = {}
    for point, x in points.items():
        if point == LAYERS:
            layers = {each: _to_host(stacked) for each, stacked in x.items()}
            named.update(
                {f"{stack}layers.{layer}.{each}": part for each, parts in layers.items() for layer, part in enumerate(parts)}
            )
        elif isinstance(x, Mapping):
            named |= _by_name(x, f"{point}.")
        else:
            named[f"{stack}{point}"] = _to_host(x)
    return named


def _examined(run: Run) -> Run:
    """The run as it is examined: without dropout, and with everything on the one device."""
    on_device = run.config.jax.model_copy(update={"offload_optimizer": "none"})
    config = run.config.model_copy(update={"jax": on_device})
    return replace(run, config=config, model=replace(run.model, spec=run.model.spec.without_dropout()))


def _build_gradients(
    network: Network, shardings: Mapping[str, NamedSharding], rates: Mapping[str, NDArray[np.float64]]
) -> Callable[[Params, DeviceBatch], tuple[jax.Array, Params]]:
    """Loss and gradients as training computes them."""

    def compute(params: Params, batch: DeviceBatch) -> tuple[jax.Array, Params]:
        metrics, gradients = loss_and_gradients(network, shardings, params, batch, lambda _: None, rates)
        return metrics.loss, gradients

    return jax.jit(compute)


def _build_logits(network: Network) -> Callable[[Params, DeviceBatch], tuple[jax.Array, _Routed | None]]:
    """(A, B, S, V), and what routers decided if there are any."""
    experts = network.spec.mlp.experts

    def compute(params: Params, batch: DeviceBatch) -> tuple[jax.Array, _Routed | None]:
        used = network.cast(params)

        def one(micro: DeviceBatch) -> tuple[jax.Array, _Routed | None]:
            recorder = Recorder({})
            logits_BSV = forward(network, used, micro, None, recorder)
            if experts is None:
                return logits_BSV, None
            layers = recorder.records()[LAYERS]
            return logits_BSV, _Routed(layers["router"], layers[CHOSEN])

        found: tuple[jax.Array, _Routed | None] = jax.lax.map(one, batch)
        return found

    return jax.jit(compute)


def _build_capture(network: Network) -> Callable[[Params, DeviceBatch], _Captured]:
    """The pass of a batch of one micro-batch, with everything that the model's taps see."""
    statistics = network.runtime.policy.statistics

    def compute(params: Params, batch: DeviceBatch) -> _Captured:
        micro = jax.tree.map(lambda leaf: leaf[0], batch)
        tokens = jnp.sum(batch.weights.astype(statistics))

        def share(used: Params, offsets: Points) -> tuple[jax.Array, Points]:
            recorder = Recorder(offsets)
            return objective(network, used, micro, None, recorder)[0] / tokens, recorder.records()

        used = network.cast(params)
        _, points = jax.eval_shape(share, used, {})
        layers = {point: x for point, x in points[LAYERS].items() if point != CHOSEN}
        offsets = jax.tree.map(lambda point: jnp.zeros(point.shape, point.dtype), points | {LAYERS: layers})
        (loss, values), (gradients, cotangents) = jax.value_and_grad(share, argnums=(0, 1), has_aux=True)(used, offsets)
        gradients = {path: gradient.astype(statistics) for path, gradient in gradients.items()}
        return _Captured(loss, gradients, values, cotangents)

    return jax.jit(compute)


def _choices(routed: _Routed | None, rows: int) -> dict[str, Choices]:
    """By point, of the rows of a batch; nothing where there are no routers."""
    if routed is None:
        return {}
    logits, chosen = _to_host(routed.logits), np.asarray(routed.chosen, np.int64)
    decided = {}
    for layer in range(logits.shape[1]):
        decided[f"layers.{layer}.router"] = Choices(_rows(logits[:, layer], rows), _rows(chosen[:, layer], rows))
    return decided


def _rows(parts: NDArray[Any], rows: int) -> NDArray[Any]:
    """The rows of a batch from those of its micro-batches (A, B, ...), without what fills up the last one."""
    return parts.reshape(-1, *parts.shape[2:])[:rows]


def _to_host(x: Any) -> Array:
    """float32, or float64 where it is float64."""
    values = np.asarray(x)
    return np.asarray(values, np.float64 if values.dtype == np.float64 else np.float32)
