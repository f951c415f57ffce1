"""A topology as people write it: `v5p:4x4x8`, a generation and the chips along each dimension of its torus."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxllm.errors import JaxllmError
from jaxllm.planning.tpu.generations import GENERATIONS, Generation

# Chips of one host along x, y, z; slices of fewer chips are part of a host.
_HOST = (2, 2, 1)

EXAMPLES = {
    "v4": "v4:2x2x1 v4:2x2x2 v4:2x2x4 v4:2x4x4 v4:4x4x4 v4:4x4x8 v4:4x8x8 v4:8x8x8",
    "v5e": "v5e:1x1 v5e:2x2 v5e:2x4 v5e:4x4 v5e:4x8 v5e:8x8 v5e:8x16 v5e:16x16",
    "v5p": "v5p:2x2x1 v5p:2x2x2 v5p:2x2x4 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8 v5p:4x8x8 v5p:8x8x8 v5p:8x8x16 v5p:8x16x16",
    "v6e": "v6e:1x1 v6e:2x2 v6e:2x4 v6e:4x4 v6e:4x8 v6e:8x8 v6e:8x16 v6e:16x16",
    "tpu7x": "tpu7x:2x2x1 tpu7x:2x2x2 tpu7x:2x2x4 tpu7x:2x4x4 tpu7x:4x4x4 tpu7x:4x4x8 tpu7x:4x8x8 tpu7x:8x8x8",
}


@dataclass(frozen=True)
class Topology:
    """`slices` slices of `chips` chips each."""

    generation: Generation
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """`v5p:4x4x8`."""
        return f"{self.generation.name}:{'x'.join(map(str, self.dims))}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.generation.chip.devices_per_chip

    @property
    def host(self) -> tuple[int, int, int]:
        """Chips of one host along each dimension."""
        x, y, z = (*self.dims, 1, 1)[:3]
        if x * y * z == 1:
            return (1, 1, 1)
        return (2, 4, 1) if self.generation.dimensions == 2 and (x, y) == (2, 4) else _HOST

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Read `GENERATION:AxB` or `GENERATION:AxBxC`.  JaxllmError, listing what there is, for anything else."""
    match = re.fullmatch(r"([\w]+):(\d+)x(\d+)(?:x(\d+))?", text.strip())
    generation = GENERATIONS.get(match.group(1)) if match else None
    if match is None or generation is None:
        raise JaxllmError(f"--topology {text!r} is not a TPU topology; {_listed()}")
    dims = tuple(int(size) for size in match.groups()[1:] if size is not None)
    if len(dims) != generation.dimensions or 0 in dims:
        raise JaxllmError(
            f"--topology {text!r} gives {len(dims)} dimensions, but {generation.name} has {generation.dimensions}; "
            f"for example {EXAMPLES[generation.name].split()[-1]}"
        )
    topology = Topology(generation, dims, slices)
    if any(size % chips for size, chips in zip((*dims, 1)[:3], topology.host, strict=True)):
        raise JaxllmError(
            f"--topology {text!r} cannot be cut into hosts of {'x'.join(map(str, topology.host))} chips; "
            f"{generation.name} has for example {EXAMPLES[generation.name]}"
        )
    return topology


def _listed() -> str:
    return "there are " + "; ".join(EXAMPLES.values())
