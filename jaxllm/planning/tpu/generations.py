"""TPU generations: what a program may use of a chip, the chip's clock, and its links.  One row is one generation.

| column | where it comes from |
|---|---|
| memory | what libtpu lets a program use (it says so when a program needs more), below the data sheet's HBM |
| clock, FLOP per cycle | cycles x rate is the published bf16 peak; the compiler's estimates are in these cycles |
| link | published bidirectional ICI bandwidth per chip / 2 / number of links, one direction of one link |
| HBM, DCN | published bandwidth per chip |

A row is per JAX device: v4 and v5p show one device for a chip's two TensorCores, tpu7x one per TensorCore.  Sources:
https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x; https://jax-ml.github.io/scaling-book/tpus for link rates that
transfers reach (0.9 of the nominal rate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One generation of TPU, per JAX device.

    name: as in a topology.  kind: what JAX calls the device.  memory_bytes: usable HBM.  clock_hz and flops_per_cycle: of the
    compiler's estimates.  dimensions: of the torus.  wrap: a dimension of which size (or a multiple) closes to a ring.
    link_bytes: one direction of one link, per second.  hbm_bytes, dcn_bytes: per second.  devices_per_chip: JAX devices.
    options: what libtpu must be told beside the topology.
    """

    name: str
    kind: str
    memory_bytes: int
    clock_hz: float
    flops_per_cycle: int
    dimensions: int
    wrap: int
    link_bytes: float
    hbm_bytes: float
    dcn_bytes: float
    devices_per_chip: int = 1
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def peak_flops(self) -> float:
        """bf16 FLOP/s."""
        return self.clock_hz * self.flops_per_cycle


_ROWS = (
    # v4 pods show a chip as one device ("megacore"); libtpu would show two without being told.
    Generation("v4", "TPU v4", int(30.75 * GIB), 1.05e9, 262144, 3, 4, 50e9, 1228e9, 6.25e9,
               options={"chip_config_name": "megacore"}),
    Generation("v5e", "TPU v5 lite", int(15.75 * GIB), 1.5e9, 131072, 2, 16, 50e9, 819e9, 3.125e9),
    Generation("v5p", "TPU v5", int(95.73 * GIB), 1.75e9, 262144, 3, 4, 100e9, 2765e9, 6.25e9),
    Generation("v6e", "TPU v6 lite", int(31.24 * GIB), 1.75e9, 524288, 2, 16, 100e9, 1640e9, 12.5e9),
    Generation("tpu7x", "TPU7x", int(94.74 * GIB), 2.2e9, 524288, 3, 4, 100e9, 3690e9, 6.25e9, devices_per_chip=2),
)  # fmt: skip

GENERATIONS: Mapping[str, Generation] = {row.name: row for row in _ROWS}

LINK_EFFICIENCY = 0.9
"""Share of a link's nominal rate that a transfer reaches (the scaling book's measured 45 of 50 GB/s)."""

DIE_LINKS = 6
"""The two devices of a tpu7x chip are joined by a link of six times the rate of one ICI link."""
