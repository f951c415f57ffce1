"""Level 7: what bf16 costs on each backend, and how far apart the backends are beside it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxllm.parity.distance import Comparison, Reference
from jaxllm.parity.layouts import one_device
from jaxllm.parity.results import Check, Measurement
from jaxllm.parity.runs import Runs


def noise(runs: Runs) -> Iterator[Measurement]:
    """Train both backends in fp32 and in bf16 on one device and compare the four runs.

    Rounding to 8 bits differs between any two programs, so no figure of its own is a bound for bf16.  The measure is the
    rounding itself: the backends may be no further apart than each of them is from its own fp32 run.
    """
    own = {}
    for backend in ("jax", "deepspeed"):
        exact = Reference(runs.finished(one_device(backend, "fp32")))
        yield exact.curve("noise")
        own[backend] = exact.compare(runs.finished(one_device(backend, "bf16")), "noise")
        yield own[backend].curve
    between = Reference(runs.finished(one_device("jax", "bf16"))).compare(
        runs.finished(one_device("deepspeed", "bf16")), "noise"
    )
    yield between.curve
    for what, measure in (("loss", _loss_distance), ("parameters", _parameter_distance)):
        distances = {backend: measure(comparison) for backend, comparison in own.items()}
        detail = {f"{backend}_from_own_fp32": distance for backend, distance in distances.items()}
        beside = ", ".join(f"{name} {distances[backend]:.1e}" for backend, name in (("jax", "JAX"), ("deepspeed", "DeepSpeed")))
        name = f"{what}, DeepSpeed against JAX; from its own fp32: {beside}"
        yield Check("noise", "bf16", name, measure(between), min(distances.values()), detail)


def _loss_distance(comparison: Comparison) -> float:
    """Root mean square of the relative loss errors over all steps: single steps are chance."""
    return float(np.sqrt(np.mean(np.square(list(comparison.curve.loss_error.values())))))


def _parameter_distance(comparison: Comparison) -> float:
    return float(np.sqrt(np.mean(np.square(list(comparison.curve.parameter_distance.values())))))
