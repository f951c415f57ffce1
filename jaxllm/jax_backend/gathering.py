"""Using a weight that fsdp shards: gathered whole where it is used, its gradient scattered back at once.

Left to itself the TPU compiler may instead cut the product into as many pieces as there are shards and pass them round (a
windowed einsum), whose pieces are too small to fill the matrix units: half the speed of the whole product on 16 chips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.jax_backend.sharding import parameter_spec

GATHERED = "fsdp"

InputT = TypeVar("InputT", jax.Array, None)


def gathered(weight: jax.Array, axes: Sequence[str], mesh: Mesh) -> jax.Array:
    """`weight`, whole over fsdp and cut as it was over the other mesh axes.  axes: its logical axes.

    The gradient with respect to it is reduced and cut over fsdp in one operation (a reduce-scatter).  For uses whose backward
    pass does not need the weight; products use `with_gathered`.
    """
    return with_gathered(lambda _, whole: whole, None, weight, axes, mesh)


def with_gathered(
    use: Callable[[InputT, jax.Array], jax.Array], x: InputT, weight: jax.Array, axes: Sequence[str], mesh: Mesh
) -> jax.Array:
    """`use(x, weight)` with the weight whole over fsdp, gathered once more for the backward pass.

    Kept instead, the gathered weights of all layers together would be the whole model on every device.
    """
    if mesh.shape[GATHERED] == 1:
        return use(x, weight)
    stored = parameter_spec(axes, weight.shape, mesh.shape)
    whole = PartitionSpec(*(_without(part) for part in stored))

    def constrain(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        constrained: jax.Array = jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))
        return constrained

    @jax.custom_vjp
    def call(x: InputT, weight: jax.Array) -> jax.Array:
        return use(x, constrain(weight, whole))

    def forward(x: InputT, weight: jax.Array) -> tuple[jax.Array, tuple[InputT, jax.Array]]:
        return use(x, constrain(weight, whole)), (x, constrain(weight, stored))

    def backward(kept: tuple[InputT, jax.Array], gradient: jax.Array) -> tuple[InputT, jax.Array]:
        x, weight = kept
        _, pull = jax.vjp(use, x, constrain(weight, whole))
        to_x, to_weight = pull(gradient)
        return to_x, constrain(to_weight, stored)

    call.defvjp(forward, backward)
    used: jax.Array = call(x, weight)
    return used


def _without(part: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    names = (part,) if isinstance(part, str) else part or ()
    return tuple(name for name in names if name != GATHERED) or None
