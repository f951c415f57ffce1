"""Declaring a parameter: once, with its shape and logical axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.jax_backend.model.runtime import Runtime

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def parameter(shape: Sequence[int], axes: Sequence[str], runtime: Runtime) -> nnx.Param[jax.Array]:
    """A parameter in the master dtype.  Its value is a placeholder: weights are filled in by `jax_backend.weights`."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    return nnx.Param(jnp.zeros(shape, runtime.policy.master), axes=tuple(axes))


def stacked(build: Callable[[], ModuleT], layers: int) -> ModuleT:
    """`layers` copies of a module as one, every parameter with a leading `layers` axis, ready for `jax.lax.scan`."""
    module = jax.vmap(lambda _: build(), axis_size=layers, in_axes=None)(None)
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    stack: ModuleT = jax.tree.map(lambda leaf: leaf.replace(axes=("layers", *leaf.axes)), module, is_leaf=is_variable)
    return stack
