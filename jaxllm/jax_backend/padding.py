"""The vocabulary filled up, where the mesh does not divide it: what is taken out of a checkpoint and put in again.

The rows that are added (`sharding.vocabulary_rows`) are zeros and stay so: nothing reads them, their logits are minus infinity,
and so they have no gradient.  They exist on the devices alone: weights are read and written, and checkpoints are saved, in the
model's own shapes, so that any other mesh can take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.families import WeightRule, flax_leaves
from jaxllm.jax_backend.cuts import stored_shape
from jaxllm.jax_backend.network import Params
from jaxllm.jax_backend.offload import Storage, to_device

Trees = dict[str, Params]


@dataclass(frozen=True)
class _Leaf:
    """A parameter, or a moment, that is filled up.  own, sharding: its shape and where it lies without the filling."""

    own: tuple[int, ...]
    sharding: NamedSharding
    remove: Callable[[jax.Array], jax.Array]
    add: Callable[[jax.Array], jax.Array]


class VocabularyFilling:
    """Of a run's parameters and moments, by the names of a checkpoint's trees and Flax path."""

    def __init__(self, rules: Sequence[WeightRule], mesh: Mesh, storage: Storage) -> None:
        filled = {leaf.path: (leaf.shape, stored_shape(leaf, mesh.shape)) for leaf in flax_leaves(rules)}
        self._filled = {path: shapes for path, shapes in filled.items() if shapes[0] != shapes[1]}
        self._shardings = storage.tree_shardings
        self._leaves = {
            tree: {path: _leaf(*shapes, shardings[path]) for path, shapes in self._filled.items()}
            for tree, shardings in self._shardings.items()
        }

    def shapes(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """The model's own shapes, of those on the mesh."""
        own = {path: jax.ShapeDtypeStruct(self._filled[path][0], shapes[path].dtype) for path in self._filled}
        return {**shapes, **own}

    @property
    def shardings(self) -> dict[str, dict[str, NamedSharding]]:
        """Where everything lies in its own shape."""
        return {
            tree: {**shardings, **{path: leaf.sharding for path, leaf in self._leaves[tree].items()}}
            for tree, shardings in self._shardings.items()
        }

    def remove(self, trees: Mapping[str, Params]) -> Trees:
        """The trees in the model's own shapes."""
        return {
            tree: {**params, **{path: leaf.remove(params[path]) for path, leaf in self._leaves[tree].items()}}
            for tree, params in trees.items()
        }

    def add(self, trees: Mapping[str, Params]) -> Trees:
        """The inverse of `remove`."""
        return {
            tree: {**params, **{path: leaf.add(params[path]) for path, leaf in self._leaves[tree].items()}}
            for tree, params in trees.items()
        }


def _leaf(own: tuple[int, ...], stored: tuple[int, ...], sharding: NamedSharding) -> _Leaf:
    part = tuple(slice(size) for size in own)
    pads = [(0, rows - size) for rows, size in zip(stored, own, strict=True)]
    outside = _spread(own, sharding)
    return _Leaf(
        own,
        outside,
        jax.jit(lambda leaf: to_device(leaf)[part], out_shardings=outside),
        jax.jit(lambda leaf: jnp.pad(to_device(leaf), pads), out_shardings=sharding),
    )


def _spread(shape: tuple[int, ...], filled: NamedSharding) -> NamedSharding:
    """Cut by the mesh axes that cut what is filled up, each along the largest axis that it divides."""
    cut: list[tuple[str, ...]] = [()] * len(shape)
    left = list(shape)
    for name in (name for part in filled.spec for name in ((part,) if isinstance(part, str) else part or ())):
        ways = filled.mesh.shape[name]
        divided = [axis for axis, size in enumerate(left) if size % ways == 0]
        if divided:
            largest = max(divided, key=lambda axis: left[axis])
            cut[largest], left[largest] = (*cut[largest], name), left[largest] // ways
    spec = PartitionSpec(*(part or None for part in cut))
    return NamedSharding(filled.mesh, spec, memory_kind=filled.memory_kind)
