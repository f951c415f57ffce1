"""What a step sends and receives, and the clock of a schedule: what waits for links, and what runs beside the core's work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """A collective.  size: bytes of the whole array (gathered, reduced, or sent).  received: bytes that a device receives.

    cycles: of one execution by itself.  exposed: of those, what the core waits for.
    """

    kind: str
    axes: str
    source: str
    phase: str
    times: int
    size: float
    received: float
    cycles: float
    exposed: float


@dataclass(frozen=True)
class Transfer:
    """A copy between HBM and the host's memory; cycles and exposed as of a collective."""

    to_host: bool
    times: int
    size: float
    cycles: float
    exposed: float


@dataclass(frozen=True)
class Communication:
    """A collective or a host copy that the walk has met.  queue: the links it needs, which do one thing at a time."""

    queue: str
    cycles: float
    finished: Collective | Transfer  # with exposed still to be filled in


class Schedule:
    """The clock of one computation and what runs beside it."""

    def __init__(self) -> None:
        self.clock = 0.0
        self._free: dict[str, float] = {}
        self._begun: dict[str, tuple[float, Communication]] = {}

    def begin(self, name: str, what: Communication) -> None:
        """Something asynchronous starts as soon as its links are free."""
        end = max(self.clock, self._free.get(what.queue, 0.0)) + what.cycles
        self._free[what.queue] = end
        self._begun[name] = (end, what)

    def rename(self, old: str, new: str) -> bool:
        """What was begun as `old` is waited for as `new`; whether there is such a thing."""
        if old in self._begun:
            self._begun[new] = self._begun.pop(old)
        return new in self._begun

    def wait(self, name: str) -> tuple[Communication, float] | None:
        """The core waits for what was begun under `name`; for how long."""
        if name not in self._begun:
            return None
        end, what = self._begun.pop(name)
        waited = max(0.0, end - self.clock)
        self.clock += waited
        return what, waited

    def left(self) -> list[str]:
        """What was begun and never waited for by name."""
        return list(self._begun)
