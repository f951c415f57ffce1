"""The parts of a run's training step on a mesh, put together without any weight: the same for a run and for a trial compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from jaxllm.families.rates import leaf_scales, rate_scales
from jaxllm.jax_backend.attention.choose import kernel_of
from jaxllm.jax_backend.mesh import check_mesh
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.network import Network, build_network
from jaxllm.jax_backend.offload import Storage, storage_of
from jaxllm.jax_backend.optimizer import adamw
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout, parameter_shardings
from jaxllm.jax_backend.step import TrainStep, build_train_step
from jaxllm.run import Run


@dataclass(frozen=True)
class Assembly:
    """A network on a mesh, its optimiser and its step.

    shardings: of parameters and gradients by Flax path, while they are computed with.  storage: where parameters and moments
    are between two steps.
    """

    network: Network
    shardings: dict[str, NamedSharding]
    storage: Storage
    optimizer: optax.GradientTransformationExtraArgs
    train_step: TrainStep
    rates: Mapping[str, NDArray[np.float64]]


def runtime_of(run: Run, mesh: Mesh) -> Runtime:
    """How a run computes on a mesh: dtypes, layout, rematerialisation, attention kernel."""
    config = run.config
    policy = policy_of(config.training.precision)
    attention = kernel_of(config.jax, run.model.spec, config.data.sequence_length, policy, mesh)
    on_host = config.jax.offload_optimizer == "all"
    return Runtime(policy, Layout(mesh), config.jax.remat, attention, on_host, config.training.loss_chunk)


def assemble(run: Run, mesh: Mesh) -> Assembly:
    """The step of a run on a mesh.  ConfigError when the mesh cannot cut the model, or the kernel cannot do it."""
    config, rules = run.config, run.model.rules
    check_mesh(run, mesh)
    network = build_network(run.model.spec, runtime_of(run, mesh))
    shardings = parameter_shardings(rules, mesh)
    rates = leaf_scales(run.model, rate_scales(run.model, config.optimizer))
    optimizer = adamw(config.optimizer, {path: rule.decays for rule in rules for path in rule.paths}, rates)
    storage = storage_of(shardings, config.jax.offload_optimizer)
    train_step = build_train_step(network, optimizer, config.optimizer, shardings, config.seed, storage, rates)
    return Assembly(network, shardings, storage, optimizer, train_step, rates)
