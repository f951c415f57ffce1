"""Network: the Flax module split once into structure and a flat dict of arrays, keyed by dotted Flax path.

Everything after this works on pure pytrees.  Flax runs in tree mode (`graph=False`): modules are ordinary JAX pytrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
from flax import nnx, traverse_util

from jaxllm.families.spec import ModelSpec
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.transformer import Transformer
from jaxllm.jax_backend.offload import to_device

Params = dict[str, jax.Array]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` -> `{"a": {"b": x}}`, as Flax and Orbax want it."""
    return dict(traverse_util.unflatten_dict(dict(flat), sep="."))  # type: ignore[no-untyped-call]


def flatten_paths(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`."""
    return dict(traverse_util.flatten_dict(dict(nested), sep="."))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Network:
    """A model's structure.  shapes and axes: of every parameter, by Flax path."""

    spec: ModelSpec
    graphdef: Any
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, tuple[str, ...]]
    runtime: Runtime

    def bind(self, params: Mapping[str, jax.Array]) -> Transformer:
        """The module with these parameters."""
        return cast(Transformer, nnx.merge(self.graphdef, nest(params)))

    def cast(self, params: Mapping[str, jax.Array]) -> Params:
        """Parameters as they are used: on the devices, in the compute dtype, all of them, as DeepSpeed's bf16 engine does."""
        if self.runtime.masters_on_host:
            params = to_device(dict(params))
        return {path: value.astype(self.runtime.policy.compute) for path, value in params.items()}


def build_network(spec: ModelSpec, runtime: Runtime) -> Network:
    """The model's structure, built abstractly: no weight is ever allocated here."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(spec, runtime), graph=False), graph=False)
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    shapes = {path: jax.ShapeDtypeStruct(variable.shape, variable.dtype) for path, variable in variables.items()}
    axes = {path: tuple(variable.get_metadata()["axes"]) for path, variable in variables.items()}
    return Network(spec, graphdef, shapes, axes, runtime)
