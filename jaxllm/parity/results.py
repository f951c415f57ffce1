"""What the parity levels measure: checks against the table of tolerances, curves of whole runs, and the report of both."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jaxllm.config.schema import Precision

Level: TypeAlias = Literal["weights", "forward", "backward", "optimizer", "trajectory", "switch", "noise"]

LEVELS: tuple[Level, ...] = ("weights", "forward", "backward", "optimizer", "trajectory", "switch", "noise")
"""The ladder, from the bottom up."""

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    name: what, as a person says it ("gradient of model.layers.0.mlp.up_proj.weight, packed text").  measured: its relative
    error (`relative_error`).  bound: from the table of tolerances; infinite where there is none.  detail: whatever else is
    known, in JSON's types; the check of one gradient has `parameter` (its Hugging Face name) and `input` (what was fed).
    """

    level: Level
    precision: Precision
    name: str
    measured: float
    bound: float
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the bound holds; NaN never does, nor does infinity where there is no bound."""
        return math.isfinite(self.measured) and self.measured <= self.bound

    def to_json(self) -> dict[str, Any]:
        """The check as JSON; a number that is not finite, which JSON cannot hold, becomes null."""
        return {
            "level": self.level,
            "precision": self.precision,
            "name": self.name,
            "measured": finite(self.measured),
            "bound": finite(self.bound),
            "passed": self.passed,
            "detail": dict(self.detail),
        }


@dataclass(frozen=True)
class Curve:
    """A whole run: its loss after each step (counted from 1), and how far it is from a reference run.

    name: the run ("DeepSpeed, ZeRO 2, 2 processes").  reference: the run that the distances are from, None for the reference
    itself.  loss: nats per token of step i's batch.  loss_error: relative, at each step.  parameter_distance: relative, after
    the steps at which both runs saved their state.  switched_at: the step after which the run changed its backend or layout.
    """

    level: Level
    precision: Precision
    name: str
    loss: Mapping[int, float]
    reference: str | None = None
    loss_error: Mapping[int, float] = field(default_factory=dict)
    parameter_distance: Mapping[int, float] = field(default_factory=dict)
    switched_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON: [step, value] pairs."""
        return {
            "level": self.level,
            "precision": self.precision,
            "name": self.name,
            "reference": self.reference,
            "switched_at": self.switched_at,
            "loss": [[step, finite(value)] for step, value in self.loss.items()],
            "loss_error": [[step, finite(value)] for step, value in self.loss_error.items()],
            "parameter_distance": [[step, finite(value)] for step, value in self.parameter_distance.items()],
        }


Measurement: TypeAlias = Check | Curve
"""What a level yields, as soon as it is known."""


@dataclass(frozen=True)
class GradientError:
    """The worst relative error of one parameter's gradient over all inputs.  layer: None outside of the layers."""

    precision: Precision
    parameter: str
    layer: int | None
    kind: str
    error: float


@dataclass(frozen=True)
class Report:
    """Everything a parity run found.

    config: name of the run.  steps: of a trajectory.  notes: what a person must know to read it, for example that dropout was
    switched off.  versions, machine: what it ran on.
    """

    config: str
    family: str
    steps: int
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    curves: tuple[Curve, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether something was checked, and every bound holds."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def gradients(self) -> tuple[GradientError, ...]:
        """The worst error of each parameter's gradient in each precision, in the order in which they were checked."""
        worst: dict[tuple[Precision, str], float] = {}
        for check in self.checks:
            if check.level == "backward" and "parameter" in check.detail:
                key = (check.precision, str(check.detail["parameter"]))
                worst[key] = max(worst.get(key, 0.0), check.measured, key=_badness)
        return tuple(GradientError(precision, name, *layer_and_kind(name), error) for (precision, name), error in worst.items())

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "config": self.config,
            "family": self.family,
            "passed": self.passed,
            "steps": self.steps,
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "checks": [check.to_json() for check in self.checks],
            "curves": [curve.to_json() for curve in self.curves],
        }


def layer_and_kind(parameter: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (3, "mlp.up_proj.weight"); (None, whole name) for what is in no layer."""
    match = _LAYER.search(parameter)
    return (int(match[1]), parameter[match.end() :]) if match else (None, parameter)


def finite(value: float) -> float | None:
    """The number, or None when it is not finite."""
    return value if math.isfinite(value) else None


def _badness(error: float) -> float:
    """An order in which NaN is the worst."""
    return math.inf if math.isnan(error) else error
