"""From logical axes to the mesh: the one table, and what follows from it for parameters and activations.

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

from jaxllm.errors import ConfigError
from jaxllm.families import ModelSpec, WeightRule, flax_leaves
from jaxllm.families.weights import Leaf
from jaxllm.jax_backend.zigzag import zigzag

# Outermost first: neighbours on the last axis are nearest to each other, and tensor parallelism talks the most.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# THE table.  `embed` is the hidden dimension of a parameter, `hidden` the same dimension of an activation; `residual` is the
# sequence between the products that `tensor` splits, where norms and residuals would otherwise be computed on every one of its
# devices (sequence parallelism, arXiv:2205.05198).
LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": ("context", "tensor"),
    "hidden": (),
    "layers": (),
    "position": (),
    "token_type": (),
    "buckets": (),
    "embed_out": (),
    "label": (),
    "head_dim": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "router": (),
}

# How an error message calls a dimension.
_DIMENSIONS = {
    "heads": "the number of attention heads",
    "kv_heads": "the number of key/value heads",
    "mlp": "the MLP's inner size",
    "embed": "the hidden size",
    "experts": "the number of experts",
}


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


def vocabulary_rows(entries: int, hidden_size: int, mesh: Mapping[str, int]) -> int:
    """Rows of a vocabulary's parameters: as many more than its entries as it takes for the mesh to cut them evenly.

    fsdp cuts the vocabulary, too, where it does not divide the hidden size.
    """
    ways = math.prod(mesh[axis] for axis in LOGICAL_AXES["vocab"])
    ways *= 1 if hidden_size % mesh["fsdp"] == 0 else mesh["fsdp"]
    return -(-entries // ways) * ways


def stored_shape(leaf: Leaf, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a parameter on a mesh: its own, but for the rows that the vocabulary is filled up with."""
    sizes = leaf.rule.sizes
    rows = vocabulary_rows(sizes["vocab"], sizes["embed"], mesh) if "vocab" in leaf.axes else 0
    return tuple(rows if axis == "vocab" else size for axis, size in zip(leaf.axes, leaf.shape, strict=True))


def parameter_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """Of a parameter with these logical axes: each as the table says; what cannot be cut there is cut along another axis.

    shape: as `stored_shape` has it.
    """
    cut: dict[str, tuple[str, ...]] = {}
    homeless: list[tuple[str, str, int]] = []
    for axis, size in zip(axes, shape, strict=True):
        for mesh_axis in LOGICAL_AXES[axis]:
            if size % mesh[mesh_axis] == 0:
                cut[axis] = (*cut.get(axis, ()), mesh_axis)
            elif axis == "embed":
                homeless.append((mesh_axis, axis, size))
            else:
                raise _indivisible(mesh_axis, mesh[mesh_axis], axis, size)
    if "embed" not in axes:
        homeless.append(("fsdp", "embed", 0))
    for mesh_axis, axis, size in homeless:
        _rehouse(cut, axes, shape, mesh, mesh_axis, axis, size)
    return PartitionSpec(*(cut.get(axis) for axis in axes))


def _rehouse(
    cut: dict[str, tuple[str, ...]],
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: Mapping[str, int],
    mesh_axis: str,
    axis: str,
    size: int,
) -> None:
    """Cut the largest axis that can take `mesh_axis` as well.  Vectors that cannot be cut stay whole: they are small."""
    candidates = [
        (length, other)
        for other, length in zip(axes, shape, strict=True)
        if other != "layers" and length % (mesh[mesh_axis] * math.prod(mesh[taken] for taken in cut.get(other, ()))) == 0
    ]
    if candidates:
        _, other = max(candidates)
        cut[other] = (*cut.get(other, ()), mesh_axis)
    elif len([other for other in axes if other != "layers"]) > 1 and size:
        raise _indivisible(mesh_axis, mesh[mesh_axis], axis, size)


def _indivisible(mesh_axis: str, ways: int, axis: str, size: int) -> ConfigError:
    return ConfigError(
        f"parallel.{mesh_axis}",
        f"{ways} does not divide {_DIMENSIONS[axis]} ({axis} = {size}); use a divisor of {size}",
    )
