"""Level 7: what bf16 costs on each backend, and how far apart the backends are beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from jaxllm.parity.distance import Comparison, Reference
from jaxllm.parity.layouts import one_device
from jaxllm.parity.results import Check, Curve, Measurement
from jaxllm.parity.runs import Runs
from jaxllm.parity.tolerances import noise_bound

_Errors: TypeAlias = Callable[[Curve], Mapping[int, float]]


def noise(runs: Runs) -> Iterator[Measurement]:
    """Train both backends in fp32 and in bf16 on one device and compare the four runs.

    Any two programs round to 8 bits in different places, so that no figure of its own is a bound for bf16.  The measure is the
    rounding itself: the losses of the backends may be no further apart than each is from those of its own fp32 run.  Most of
    that distance is the rounding of the weights, which both share; what is left is where each rounds its activations.
    Parameters have no bound, for the reason that they have none in fp32.
    """
    own: dict[str, Comparison] = {}
    for backend in ("jax", "deepspeed"):
        exact = Reference(runs.finished(one_device(backend, "fp32")))
        yield exact.curve("noise")
        own[backend] = exact.compare(runs.finished(one_device(backend, "bf16")), "noise")
        yield own[backend].curve
    rounded = Reference(runs.finished(one_device("jax", "bf16")))
    between = rounded.compare(runs.finished(one_device("deepspeed", "bf16")), "noise")
    yield between.curve
    loss = _check("loss", between, own, lambda curve: curve.loss_error)
    yield loss
    yield replace(_check("parameters", between, own, lambda curve: curve.parameter_distance), bound=math.inf)
    if not loss.passed:
        yield from _control(runs, rounded, loss.bound)


def _check(what: str, between: Comparison, own: Mapping[str, Comparison], errors: _Errors) -> Check:
    """The distance between the backends, bounded by their distances from fp32."""
    distances = {backend: root_mean_square(errors(comparison.curve)) for backend, comparison in own.items()}
    beside = f"from fp32: JAX {distances['jax']:.1e}, DeepSpeed {distances['deepspeed']:.1e}"
    detail = {f"{backend}_from_fp32": distance for backend, distance in distances.items()}
    measured = root_mean_square(errors(between.curve))
    return Check("noise", "bf16", f"{what}, DeepSpeed against JAX; {beside}", measured, noise_bound(distances.values()), detail)


def _control(runs: Runs, reference: Reference, bound: float) -> Iterator[Measurement]:
    """JAX in bf16 against itself with another micro-batch, see `jaxllm.parity.trajectory.control`."""
    if (layout := runs.control_layout("bf16")) is not None:
        comparison = reference.compare(runs.finished(layout), "noise")
        yield comparison.curve
        measured = root_mean_square(comparison.curve.loss_error)
        detail = {"control": True, "amplifies": measured > bound}
        yield Check("noise", "bf16", f"control: loss, {layout.name}, against itself", measured, math.inf, detail)


def root_mean_square(errors: Mapping[int, float]) -> float:
    """Over all steps: a single step is chance."""
    return float(np.sqrt(np.mean(np.square(list(errors.values())))))
