"""What waits in the memory of the host between its uses (`jax.offload_optimizer`).

Devices copy it in and out within the compiled step.  On the CPU both memories are the same, and the copies are real: a run can
be tried there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from jaxllm.config.schema import OptimizerOffload
from jaxllm.errors import ConfigError
from jaxllm.jax_backend.remat import HOST_MEMORY

TreeT = TypeVar("TreeT")


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
