"""TPU generations that the step can be compiled for: their chip, their network, and what libtpu must be told of them.

Rates, memory and clocks are in the one table of chips (`jaxllm.metrics.chips`).  Added here, with sources:

| | |
|---|---|
| dimensions, wrap | shape of the torus; a dimension of a multiple of `wrap` chips closes to a ring (https://cloud.google.com/tpu/docs/v4 and the pages of the other generations) |
| DCN | published data-centre bandwidth per chip (the same pages) |
| link efficiency | transfers reach 45 of the nominal 50 GB/s of a link (https://jax-ml.github.io/scaling-book/tpus) |
| hop latency | about a microsecond (the same book) |
| die link | the two devices of a tpu7x chip have a link of six times an ICI link's rate (https://cloud.google.com/tpu/docs/tpu7x) |
"""  # noqa: E501 - a table's rows

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxllm.metrics.chips import Chip, named_chip

LINK_EFFICIENCY = 0.9
HOP_SECONDS = 1e-6
DIE_LINKS = 6


@dataclass(frozen=True)
class Generation:
    """One generation.

    dcn: bytes/s of one device.  options: of libtpu's topology, beside its shape.  cores: TensorCores of one device.
    """

    chip: Chip
    dimensions: int
    wrap: int
    dcn: float
    options: Mapping[str, object] = field(default_factory=dict)
    cores: int = 1

    @property
    def name(self) -> str:
        """As in a topology."""
        return self.chip.key

    @property
    def clock_hz(self) -> float:
        """Cycles per second of the compiler's estimates."""
        assert self.chip.clock_hz is not None  # noqa: S101 - every generation below has one
        return self.chip.clock_hz

    @property
    def link(self) -> float:
        """Bytes/s that a transfer reaches over one link, one way."""
        return (self.chip.link_bandwidth or 0.0) * LINK_EFFICIENCY


# v4 pods show the two TensorCores of a chip as one device ("megacore"); libtpu would show two without being told.
GENERATIONS: Mapping[str, Generation] = {
    "v4": Generation(named_chip("v4"), 3, 4, 6.25e9, {"chip_config_name": "megacore"}, cores=2),
    "v5e": Generation(named_chip("v5e"), 2, 16, 3.125e9),
    "v5p": Generation(named_chip("v5p"), 3, 4, 6.25e9, cores=2),
    "v6e": Generation(named_chip("v6e"), 2, 16, 12.5e9),
    "tpu7x": Generation(named_chip("tpu7x"), 3, 4, 6.25e9),
}
