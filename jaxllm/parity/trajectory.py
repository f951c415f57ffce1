"""Level 5: N steps of training, each layout against JAX on one device."""

from __future__ import annotations

import math
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

    keep: layouts whose saved states are needed later; those of the others are deleted as soon as they are compared.  When a
    bound breaks, JAX is compared with itself as well, see `control`.
    """
    reference = Reference(runs.finished(one_device("jax", precision)))
    yield reference.curve("trajectory")
    broken = False
    for layout in layouts:
        run = runs.finished(layout)
        comparison = reference.compare(run, "trajectory")
        if layout not in keep:
            runs.discard(run)
        yield comparison.curve
        for check in checks(comparison, "trajectory", precision, f"{layout.name}, against {reference.run.name}"):
            broken = broken or not check.passed
            yield check
    if broken:
        yield from control(runs, reference)


def control(runs: Runs, reference: Reference) -> Iterator[Measurement]:
    """JAX on one device against itself with another micro-batch: the same sums in another order.

    Some runs amplify any rounding error, at a spike of the loss for example, until two trajectories have nothing in common.
    Such a run departs from itself as far as from the other backend, and is no test of either.
    """
    precision = reference.run.precision
    layout = runs.control_layout(precision)
    if layout is None:
        return
    run = runs.finished(layout)
    comparison = reference.compare(run, "trajectory")
    runs.discard(run)
    yield comparison.curve
    detail = {"control": True, "amplifies": comparison.loss.error > TOLERANCES[precision].trajectory_loss}
    yield Check("trajectory", precision, f"control: loss, {run.name}, against itself", comparison.loss.error, math.inf, detail)


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
