"""How a mesh cuts parameters: the one table from logical to mesh axes.  Nothing here imports JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxllm.errors import ConfigError
from jaxllm.families.weights import Leaf

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


def parameter_cuts(axes: Sequence[str], shape: Sequence[int], mesh: Mapping[str, int]) -> tuple[tuple[str, ...] | None, ...]:
    """The mesh axes that cut each dimension of a parameter with these logical axes; None: it stays whole.

    shape: as `stored_shape` has it.  Each as the table says; what cannot be cut there is cut along another axis.  ConfigError,
    naming mesh axis, dimension and size, when a dimension that must be cut cannot be cut evenly.
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
    return tuple(cut.get(axis) for axis in axes)


def shard_shape(axes: Sequence[str], shape: Sequence[int], mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the part of such a parameter that one device of a mesh of these sizes holds."""
    cuts = parameter_cuts(axes, shape, mesh)
    return tuple(size // math.prod(mesh[name] for name in cut or ()) for size, cut in zip(shape, cuts, strict=True))


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
