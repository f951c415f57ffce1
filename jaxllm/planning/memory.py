"""How much memory one device needs: at each moment of a step that could be the fullest one, and what fills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARTS = ("parameters", "moments", "gradients", "activations", "logits", "weights in use", "buffers", "working")
"""What memory is spent on.

parameters, moments: masters and Adam's two.  gradients.  activations: kept from the forward to the backward pass.  logits: with
all copies of that size.  weights in use: copies in the compute dtype, gathered from other devices.  buffers: of a framework's
collectives.  working: one layer's own intermediate values, and what a batch needs.
"""


@dataclass(frozen=True)
class Moment:
    """A moment of a step.  parts: bytes on one device."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Memory of one device.  moments: all that were looked at.  host: bytes in the host's memory for each device."""

    moments: Sequence[Moment]
    host: float = 0.0

    @property
    def fullest(self) -> Moment:
        """The moment that decides."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        return self.fullest.total

    def to_json(self) -> dict[str, object]:
        """For a report."""
        return {
            "peak_bytes": round(self.peak),
            "moment": self.fullest.name,
            "parts": {name: round(size) for name, size in self.fullest.parts.items() if size},
            "host_bytes": round(self.host),
        }


def moment(name: str, **parts: float) -> Moment:
    """A moment; `weights_in_use` stands for the part `weights in use`."""
    return Moment(name, {part: parts.get(part.replace(" ", "_"), 0.0) for part in PARTS})
