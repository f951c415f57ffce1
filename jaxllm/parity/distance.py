"""How far one run is from another: its loss at every step, its parameters at the steps that both saved."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxllm.parity.results import Curve, Level
from jaxllm.parity.runs import FinishedRun
from jaxllm.parity.tolerances import has_gradient, idle_parameters, relative_error
from jaxllm.state import TrainingState
from jaxllm.state.training_state import Array

_KEPT_BYTES = 2**28
"""Of one run: this much memory is worth the time of reading its states again for every run that is compared with it."""


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
        self._kept: dict[int, Mapping[str, _Compared]] = run.kept

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
        found = other.state(step).params
        errors = (
            Worst(relative_error(found.read(name)[wanted.mask], wanted.values), step, name)
            for name, wanted in self._parameters(step).items()
        )
        return max(errors, key=_badness)

    def _parameters(self, step: int) -> Mapping[str, _Compared]:
        if step not in self._kept:
            values = _compared(self.run.state(step), idle_parameters(self.run.run.model))
            states = len(self.run.saved_steps())
            if states * sum(each.values.nbytes + each.mask.nbytes for each in values.values()) > _KEPT_BYTES:
                return values
            self._kept[step] = values
        return self._kept[step]


@dataclass(frozen=True)
class _Compared:
    """The elements of a parameter that are compared: all that have a gradient.  values: those that mask names."""

    values: Array
    mask: NDArray[np.bool_]


def _compared(state: TrainingState, idle: Collection[str]) -> dict[str, _Compared]:
    """Every parameter of a state that is not idle; the second moments tell the size of its gradients."""
    assert state.exp_avg_sq is not None  # noqa: S101 - a run that was trained has moments
    sizes = {
        name: np.sqrt(np.asarray(state.exp_avg_sq.read(name), np.float64))
        for name in state.exp_avg_sq.names()
        if name not in idle
    }
    largest = max(float(size.max(initial=0.0)) for size in sizes.values())
    masks = {name: has_gradient(size, largest) for name, size in sizes.items()}
    return {name: _Compared(state.params.read(name)[mask], mask) for name, mask in masks.items()}


def _badness(worst: Worst) -> float:
    """An order in which NaN is the worst."""
    return math.inf if math.isnan(worst.error) else worst.error
