"""Using a weight that fsdp shards: gathered whole where it is used, its gradient scattered back at once.

Left to itself the TPU compiler may instead cut the product into as many pieces as there are shards and pass them round (a
windowed einsum), whose pieces are too small to fill the matrix units: half the speed of the whole product on 16 chips.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.jax_backend.sharding import parameter_spec

GATHERED = "fsdp"


def gathered(weight: jax.Array, axes: Sequence[str], mesh: Mesh) -> jax.Array:
    """`weight`, whole over fsdp and cut as it was over the other mesh axes.  axes: its logical axes.

    The gradient with respect to it is reduced and cut over fsdp in one operation (a reduce-scatter).
    """
    if mesh.shape[GATHERED] == 1:
        return weight
    stored = parameter_spec(axes, weight.shape, mesh.shape)
    whole = PartitionSpec(*(_without(part) for part in stored))

    def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return constrained

    @jax.custom_vjp
    def use(weight: jax.Array) -> jax.Array:
        return constrain(weight, whole)

    def forward(weight: jax.Array) -> tuple[jax.Array, None]:
        return constrain(weight, whole), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (constrain(gradient, stored),)

    use.defvjp(forward, backward)
    used: jax.Array = use(weight)
    return used


def _without(part: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    names = (part,) if isinstance(part, str) else part or ()
    return tuple(name for name in names if name != GATHERED) or None
