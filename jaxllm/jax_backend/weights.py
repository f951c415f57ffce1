"""Between Hugging Face tensors and the sharded arrays of the Flax model, both ways, leaf by leaf.

In: every device's shard reads only its own slice.  Out: one layer of one tensor at a time is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.families import WeightRule, flatten, flax_leaves
from jaxllm.families.weights import Leaf
from jaxllm.jax_backend.cuts import stored_shape
from jaxllm.jax_backend.network import Params
from jaxllm.jax_backend.offload import to_device
from jaxllm.state import TensorReader
from jaxllm.state.training_state import Array

Index = tuple[slice, ...]


def load_params(
    reader: TensorReader, rules: Sequence[WeightRule], shardings: Mapping[str, NamedSharding], dtype: np.dtype
) -> Params:
    """Every tensor of the model from `reader`, laid out as `shardings` say; what the mesh adds to the vocabulary is zeros."""
    return {leaf.path: _load(reader, leaf, shardings[leaf.path], dtype) for leaf in flax_leaves(rules)}


def _load(reader: TensorReader, leaf: Leaf, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    """One Flax tensor.  Devices that hold the same slice share one reading of it."""
    cache: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}
    shape = stored_shape(leaf, sharding.mesh.shape)

    def shard(index: Index | None) -> np.ndarray:
        wanted = index or tuple(slice(None) for _ in shape)
        key = tuple(part.indices(size) for part, size in zip(wanted, shape, strict=True))
        if key not in cache:
            cache[key] = _filled(reader, leaf, [slice(start, stop) for start, stop, _ in key]).astype(dtype)
        return cache[key]

    return jax.make_array_from_callback(shape, sharding, shard)


def _filled(reader: TensorReader, leaf: Leaf, index: list[slice]) -> np.ndarray:
    """A slice of a parameter: what the model has of it, and zeros."""
    own = tuple(slice(part.start, min(part.stop, size)) for part, size in zip(index, leaf.shape, strict=True))
    if any(mine.stop <= mine.start for mine in own):
        return np.zeros([part.stop - part.start for part in index], np.float32)
    values = _read(reader, leaf.rule, leaf.position, own)
    missing = [(0, part.stop - mine.stop) for part, mine in zip(index, own, strict=True)]
    return np.pad(values, missing) if own != tuple(index) else values


def _read(reader: TensorReader, rule: WeightRule, position: int, index: Index) -> np.ndarray:
    if rule.layers is None:
        return np.asarray(rule.read_slice(lambda part: reader.read(rule.name, part), position, index))
    names = rule.names[index[0]]
    return np.stack([rule.read_slice(_part_of(reader, name), position, index[1:]) for name in names])


def _part_of(reader: TensorReader, name: str) -> Callable[[tuple[slice, ...]], Array]:
    return lambda part: reader.read(name, part)


@lru_cache(maxsize=4)
def _gathering(mesh: Mesh) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Functions that give every device a whole leaf, or one layer of it; kept, so that each shape compiles once a process."""
    whole = NamedSharding(mesh, PartitionSpec())
    one_layer = lambda stack, layer: to_device(stack)[layer]  # noqa: E731
    return jax.jit(to_device, out_shardings=whole), jax.jit(one_layer, out_shardings=whole)


class LiveWeights:
    """Sharded arrays of the running model as a TensorReader in Hugging Face names (collective).

    Valid until the next training step, which reuses the arrays' memory.
    """

    def __init__(self, params: Mapping[str, jax.Array], rules: Sequence[WeightRule], mesh: Mesh) -> None:
        self._params = params
        self._rules = {name: (rule, layer) for name, rule, layer in flatten(rules)}
        self._gather, self._gather_layer = _gathering(mesh)

    def names(self) -> Sequence[str]:
        """Hugging Face names, in checkpoint order."""
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._rules[name][0].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        """The tensor, gathered from all devices of all processes, or a slice of it."""
        rule, layer = self._rules[name]
        leaves = [self._params[path] for path in rule.paths]
        gathered = [
            np.asarray(self._gather(leaf) if layer is None else self._gather_layer(leaf, np.asarray(layer, np.int32)))
            for leaf in leaves
        ]
        if layer is None:  # the vocabulary may be filled up
            gathered = [part[tuple(map(slice, shape))] for part, shape in zip(gathered, rule.flax_shapes, strict=True)]
        tensor = rule.to_huggingface(*gathered)
        return np.array(tensor[tuple(index)] if index is not None else tensor, order="C")
