"""What waits in the memory of the host between its uses (`jax.offload_optimizer`).

Devices copy it in and out within the compiled step.  On the CPU both memories are the same, and the copies are real: a run can
be tried there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import jax
from jax.sharding import Mesh, NamedSharding

from jaxllm.config.schema import OptimizerOffload
from jaxllm.errors import ConfigError
from jaxllm.jax_backend.remat import HOST_MEMORY

if TYPE_CHECKING:
    from jaxllm.jax_backend.network import Params
    from jaxllm.jax_backend.optimizer import Moments

TreeT = TypeVar("TreeT")

State = tuple[jax.Array, jax.Array, jax.Array]
"""A parameter with its moments."""

Places = tuple[NamedSharding, NamedSharding, NamedSharding]

Update = Callable[["Params", "Params", "Moments[jax.Array]"], tuple["Params", "Moments[jax.Array]"]]
"""Gradients, parameters and moments, all on the device, to new parameters and moments."""


@dataclass(frozen=True)
class Storage:
    """Where parameters and moments are between two steps: their shardings by Flax path, memory included."""

    params: dict[str, NamedSharding]
    moments: dict[str, NamedSharding]

    @property
    def tree_shardings(self) -> dict[str, dict[str, NamedSharding]]:
        """By the names of a checkpoint's trees."""
        return {"params": self.params, "exp_avg": self.moments, "exp_avg_sq": self.moments}


def storage_of(shardings: Mapping[str, NamedSharding], offload: OptimizerOffload) -> Storage:
    """The storage of a run whose parameters are computed with in `shardings`."""
    on_device = dict(shardings)
    if offload == "none":
        return Storage(on_device, on_device)
    on_host = {path: sharding.with_memory_kind(HOST_MEMORY) for path, sharding in shardings.items()}
    return Storage(on_host if offload == "all" else on_device, on_host)


def check_host_memory(mesh: Mesh, key: str) -> None:
    """ConfigError for `key` when the devices of a mesh know no memory of the host."""
    device = mesh.devices.flat[0]
    try:
        device.memory(HOST_MEMORY)
    except (jax.errors.JaxRuntimeError, ValueError):
        raise ConfigError(key, f"{device.device_kind} devices cannot use the memory of the host; set it to none") from None


def to_device(tree: TreeT) -> TreeT:
    """Arrays, wherever they wait, in the memory of their devices; within a compiled function."""
    moved: TreeT = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)
    return moved


def updated_in_turn(
    update: Update, gradients: Params, params: Params, moments: Moments[jax.Array], storage: Storage, wanted: jax.Array
) -> tuple[Params, Moments[jax.Array]]:
    """`update` of one parameter after the other, what waits on the host being fetched for it and put back after it.

    wanted: whether to update at all; everything stays as it is otherwise.  It depends on all gradients, and what is fetched in
    a branch cannot be fetched before the branch is taken.  Without one, and also behind an optimisation barrier, the TPU
    compiler fetches most of it before the backward pass, beside the activations, and the peak is no lower than without a host.
    """
    kind = type(moments)
    new: dict[str, tuple[jax.Array, ...]] = {}
    for path, gradient in gradients.items():
        places = (storage.params[path], storage.moments[path], storage.moments[path])

        def turn(state: State, gradient: jax.Array, path: str = path, places: Places = places) -> State:
            param, exp_avg, exp_avg_sq = to_device(state)
            updated, kept = update({path: gradient}, {path: param}, kind({path: exp_avg}, {path: exp_avg_sq}))
            return cast(State, jax.device_put((updated[path], kept.exp_avg[path], kept.exp_avg_sq[path]), places))

        def stay(state: State, _: jax.Array, places: Places = places) -> State:
            return cast(State, jax.device_put(state, places))

        state = (params[path], moments.exp_avg[path], moments.exp_avg_sq[path])
        new[path] = jax.lax.cond(wanted, turn, stay, state, gradient)
    new_params, exp_avg, exp_avg_sq = ({path: leaves[i] for path, leaves in new.items()} for i in range(3))
    return new_params, kind(exp_avg, exp_avg_sq)
