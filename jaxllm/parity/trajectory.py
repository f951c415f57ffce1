"""Level 5: N steps of training, each layout against JAX on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.config.schema import Precision
from jaxllm.parity.distance import Comparison, Reference
from jaxllm.parity.layouts import Layout, one_device
from jaxllm.parity.results import Check, Level, Measurement
from jaxllm.parity.runs import Runs
from jaxllm.parity.tolerances import TOLERANCES


def trajectory(
    runs: Runs, precision: Precision, layouts: Sequence[Layout], keep: Sequence[Layout] = ()
) -> Iterator[Measurement]:
    """Train in every layout and compare loss and parameters with those of JAX on one device.

    keep: layouts whose saved states are needed later; those of the others are deleted as soon as they are compared.
    """
    reference = Reference(runs.finished(one_device("jax", precision)))
    yield reference.curve("trajectory")
    for layout in layouts:
        run = runs.finished(layout)
        comparison = reference.compare(run, "trajectory")
        if layout not in keep:
            runs.discard(run)
        yield comparison.curve
        yield from checks(comparison, "trajectory", precision, f"{layout.name}, against {reference.run.name}")


def checks(comparison: Comparison, level: Level, precision: Precision, name: str) -> Iterator[Check]:
    """Loss and parameters of a whole run against the table's bounds."""
    bound, curve = TOLERANCES[precision], comparison.curve
    common: dict[str, Any] = {"run": curve.name, "reference": curve.reference, "steps": max(curve.loss)}
    loss, parameters = comparison.loss, comparison.parameters
    detail = common | {"worst_step": loss.step, "last_step": curve.loss_error[max(curve.loss_error)]}
    yield Check(level, precision, f"loss, {name}", loss.error, bound.trajectory_loss, detail)
    last = curve.parameter_distance[max(curve.parameter_distance)]
    detail = common | {"worst_step": parameters.step, "parameter": parameters.parameter, "last_step": last}
    yield Check(level, precision, f"parameters, {name}", parameters.error, bound.trajectory_parameters, detail)
