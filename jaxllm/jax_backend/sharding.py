"""From logical axes to the mesh: what follows from the one table (`cuts`) for parameters and activations.

A parameter's logical axes come from its weight rule (`WeightRule.axes`), an activation's from the layer that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from jaxllm.families import ModelSpec, WeightRule, flax_leaves
from jaxllm.jax_backend.cuts import LOGICAL_AXES, parameter_cuts, stored_shape, vocabulary_rows
from jaxllm.jax_backend.zigzag import zigzag


@dataclass(frozen=True)
class Layout:
    """Where activations live.  replicated: logical axes that stay whole here (a decoder's batch of one)."""

    mesh: Mesh
    replicated: frozenset[str] = frozenset()

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an activation with these logical axes; None: not sharded."""
        return PartitionSpec(*(LOGICAL_AXES[axis] or None if axis and axis not in self.replicated else None for axis in axes))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an activation with these logical axes."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x`, laid out as its logical axes say."""
        if self.mesh.size == 1:
            return x
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, self.sharding(*axes))
        return constrained

    def ways(self, *axes: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that cut these logical axes."""
        cut = (name for axis in axes if axis not in self.replicated for name in LOGICAL_AXES[axis])
        return tuple(name for name in cut if self.mesh.shape[name] > 1)

    def size(self, *axes: str) -> int:
        """In how many parts the mesh cuts these logical axes."""
        return math.prod(self.mesh.shape[name] for name in self.ways(*axes))

    def vocabulary(self, model: ModelSpec) -> int:
        """Rows of the vocabulary's parameters: its entries, filled up."""
        return vocabulary_rows(model.vocab_size, model.hidden_size, self.mesh.shape)

    def token_order(self, length: int) -> NDArray[np.int32]:
        """(S,) token at each place of a row of `length` tokens.  ConfigError when the row cannot be cut."""
        return zigzag(length, self.size("sequence"))

    @property
    def platform(self) -> str:
        """JAX's name of what kind its devices are: cpu, gpu or tpu."""
        name: str = self.mesh.devices.flat[0].platform
        return name

    @property
    def whole(self) -> NamedSharding:
        """Every device holds everything."""
        return NamedSharding(self.mesh, PartitionSpec())


def data_parallel(mesh: Mesh) -> int:
    """Number of devices that see different rows."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def parameter_shardings(rules: Sequence[WeightRule], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter by Flax path (moments and gradients share it).

    Raises ConfigError, naming mesh axis, dimension and size, when a dimension that must be cut cannot be cut evenly.
    """
    return {
        leaf.path: NamedSharding(mesh, parameter_spec(leaf.axes, stored_shape(leaf, mesh.shape), mesh.shape))
        for leaf in flax_leaves(rules)
    }


def parameter_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """Of a parameter with these logical axes: see `parameter_cuts`.  shape: as `stored_shape` has it."""
    return PartitionSpec(*parameter_cuts(axes, shape, mesh))
