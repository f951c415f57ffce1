"""How far one run is from another: its loss at every step, its parameters at the steps that both saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.parity.results import Curve, Level
from jaxllm.parity.runs import FinishedRun
from jaxllm.parity.tolerances import relative_error
from jaxllm.state.training_state import Array

_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Worst:
    """The largest relative error, and where it is: a step, and for parameters the Hugging Face name of the tensor."""

    error: float
    step: int
    parameter: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One run against another.  curve: for the report."""

    curve: Curve
    loss: Worst
    parameters: Worst


class Reference:
    """A run that others are compared with.  Its saved parameters stay in memory where they are small."""

    def __init__(self, run: FinishedRun) -> None:
        self.run = run
        self._kept: dict[int, Mapping[str, Array]] = {}
        self._kept_bytes = 0

    def curve(self, level: Level) -> Curve:
        """Its own curve."""
        return Curve(level, self.run.precision, self.run.name, self.run.losses)

    def compare(self, other: FinishedRun, level: Level, after: int = 0) -> Comparison:
        """Losses and parameters of another run after step `after`, each relative to this run's."""
        losses = {step: relative_error(loss, self.run.losses[step]) for step, loss in other.losses.items() if step > after}
        saved = sorted(set(self.run.saved_steps()) & set(other.saved_steps()))
        distances = {step: self._parameter_error(other, step) for step in saved if step > after}
        curve = Curve(
            level,
            other.precision,
            other.name,
            other.losses,
            reference=self.run.name,
            loss_error=losses,
            parameter_distance={step: worst.error for step, worst in distances.items()},
            switched_at=after or None,
        )
        worst_loss = max((Worst(error, step) for step, error in losses.items()), key=_badness)
        return Comparison(curve, worst_loss, max(distances.values(), key=_badness))

    def _parameter_error(self, other: FinishedRun, step: int) -> Worst:
        """The tensor that is furthest from this run's after a step."""
        wanted, found = self._parameters(step), other.state(step).params
        errors = (Worst(relative_error(found.read(name), value), step, name) for name, value in wanted.items())
        return max(errors, key=_badness)

    def _parameters(self, step: int) -> Mapping[str, Array]:
        if step in self._kept:
            return self._kept[step]
        reader = self.run.state(step).params
        values = {name: reader.read(name) for name in reader.names()}
        self._kept_bytes += (size := sum(value.nbytes for value in values.values()))
        if self._kept_bytes <= _KEPT_BYTES:
            self._kept[step] = values
        else:
            self._kept_bytes -= size
        return values


def _badness(worst: Worst) -> float:
    """An order in which NaN is the worst."""
    return math.inf if math.isnan(worst.error) else worst.error
