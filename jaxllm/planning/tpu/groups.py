"""Which devices talk to each other in a collective, and along which axes of the mesh.

The compiler writes groups in three ways: as lists `{{0,1},{2,3}}`, as a reshaped and transposed iota `[4,2]<=[2,4]T(1,0)`, and
as axes of a mesh of its own `mesh['a'=2,'b'=4] {'b'}`, whose devices may stand in another order.  In a program of one replica
the numbers are positions in the mesh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Group = tuple[int, ...]

_LISTS = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}")
_EMPTY = re.compile(r"replica_groups=\{\}")


def groups(attributes: str, devices: int) -> list[Group]:
    """The groups of a collective; the pairs of a collective-permute.  One group of all devices when it names none."""
    match = _PAIRS.search(attributes) or _LISTS.search(attributes)
    if match:
        return [tuple(int(n) for n in found.split(",")) for found in re.findall(r"\{([\d,\s]+)\}", match.group(1))]
    match = _IOTA.search(attributes)
    if match:
        rows = int(match.group(1).split(",")[0])
        order = _device_order(match.group(2), match.group(3))
        return [] if order is None else [tuple(int(n) for n in row) for row in order.reshape(rows, -1)]
    match = _MESH.search(attributes)
    if match:
        return _mesh_groups(match.group(1), match.group(4), _device_order(match.group(2), match.group(3)))
    return [tuple(range(devices))]


def _device_order(dims: str | None, permutation: str | None) -> NDArray[np.int64] | None:
    """Devices in the order of `[2,4]T(1,0)`: counted up in that shape, then transposed; None where nothing is said."""
    if dims is None:
        return None
    shape = [int(n) for n in dims.split(",")]
    order = np.arange(math.prod(shape)).reshape(shape)
    if permutation:
        order = order.transpose([int(n) for n in permutation.split(",")])
    return order.reshape(-1)


def _mesh_groups(axes: str, used: str, devices: NDArray[np.int64] | None) -> list[Group]:
    """Groups over axes of the compiler's mesh; an axis may be used in part, as `'a':(2)4`: 4 ways after the first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    dims: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        parts = sorted((int(before), int(ways)) for axis, before, ways in wanted if axis == name and ways)
        if not parts:
            if any(axis == name for axis, _, _ in wanted):
                grouped.append(len(dims))
            dims.append(size)
            continue
        done = 1
        for before, ways in parts:
            if before > done:
                dims.append(before // done)
            grouped.append(len(dims))
            dims.append(ways)
            done = before * ways
        if done < size:
            dims.append(size // done)
    order = (np.arange(math.prod(dims)) if devices is None else devices).reshape(dims)
    rest = [axis for axis in range(len(dims)) if axis not in grouped]
    rows = order.transpose([*rest, *grouped]).reshape(-1, math.prod(dims[axis] for axis in grouped))
    return [tuple(int(n) for n in row) for row in rows]


def mesh_axes(found: Sequence[Group], sizes: Mapping[str, int]) -> str:
    """The axes of the run's mesh that the groups span, for example `fsdp` or `data+fsdp`; `-` for groups of one device.

    sizes: of the mesh, outermost first; device i is the i-th in row-major order.
    """
    names = [name for name, size in sizes.items() if size > 1]
    shape = [sizes[name] for name in names]
    spanned: set[str] = set()
    for group in found:
        coordinates = np.array(np.unravel_index(np.asarray(group), shape or [1])) if len(group) > 1 else None
        if coordinates is not None:
            spanned.update(name for name, row in zip(names, coordinates, strict=False) if len(set(row.tolist())) > 1)
    return "+".join(name for name in names if name in spanned) or "-"
