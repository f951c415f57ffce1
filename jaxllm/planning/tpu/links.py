"""How long a collective takes: its bytes over the links that its group of chips has between them.

A group of n devices gathers an array of B bytes in B (n-1)/n of receiving per device, scatters a sum likewise, and reduces in
both.  A line of chips receives over one link at a time, a closed ring over two; a group that spans several dimensions of the
torus uses the links of all of them at once.  What crosses slices goes over the data-centre network.  (The algorithms and their
costs: https://jax-ml.github.io/scaling-book/sharding.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from jaxllm.planning.tpu.generations import DIE_LINKS, HOP_SECONDS
from jaxllm.planning.tpu.groups import Group
from jaxllm.planning.tpu.topology import Topology

Place = tuple[int, ...]
"""Slice, x, y, z and core of a device."""


def wire_bytes(kind: str, members: int, size: float) -> float:
    """Bytes that each device receives for a collective of an array of `size` bytes among `members` devices."""
    share = (members - 1) / members if members else 0.0
    if kind == "all-reduce":
        return 2 * size * share
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return size * share


class Links:
    """The network between the devices of a mesh.  places: of every device, in the mesh's row-major order."""

    def __init__(self, topology: Topology, places: Sequence[Sequence[int]]) -> None:
        self._topology = topology
        self._places = [tuple(place) for place in places]
        self._known: dict[tuple[str, Group, float], float] = {}

    @cached_property
    def _dims(self) -> tuple[int, ...]:
        return (*self._topology.dims, 1, 1)[:3]

    def seconds(self, kind: str, members: Sequence[Group], size: float) -> float:
        """Time of one execution, nothing else being on the links."""
        group = max(members[:64], key=len)
        key = (kind, group, size)
        if key not in self._known:
            self._known[key] = self._of_group(kind, [self._places[i] for i in group], size)
        return self._known[key]

    def _of_group(self, kind: str, group: Sequence[Place], size: float) -> float:
        if len(set(group)) < 2:
            return 0.0
        slices = len({place[0] for place in group})
        within = [place for place in group if place[0] == group[0][0]]
        if slices > 1:
            # Each device exchanges its share of the array with its fellows on the other slices, and the rest within its own.
            across = wire_bytes(kind, slices, size / len(within)) / self._topology.generation.dcn
            return across + (self._of_group(kind, within, size) if len(within) > 1 else 0.0)
        counts = [len({place[dim] for place in within}) for dim in range(1, 5)]
        rate = self._rate(counts, permute=kind == "collective-permute")
        moved = wire_bytes(kind, len(within), size)
        if kind == "all-to-all":
            # Every part travels a quarter of a ring on average; `size` is what one device holds.
            moved = size * len(within) / 4
        hops = sum(count // 2 for count in counts)
        return moved / rate + hops * HOP_SECONDS

    def _rate(self, counts: Sequence[int], permute: bool) -> float:
        """Bytes/s that a device receives when its group spans `counts` places along x, y, z and cores."""
        generation = self._topology.generation
        links = 0.0
        for dim, count in enumerate(counts[:3]):
            if count > 1:
                ring = count == self._dims[dim] and count % generation.wrap == 0 and not permute
                links += 2.0 if ring else 1.0
        if not links:
            return generation.link * DIE_LINKS
        return generation.link * (1.0 if permute else links)
