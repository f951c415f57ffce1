"""Level 7: what bf16 costs on each backend, and how far apart the backends are beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import BackendName
from jaxllm.parity.distance import Comparison, Reference
from jaxllm.parity.inputs import counted
from jaxllm.parity.layouts import one_device
from jaxllm.parity.results import Check, Measurement
from jaxllm.parity.runs import Runs
from jaxllm.parity.subject import Subject
from jaxllm.parity.tolerances import NOISE_STEPS, noise_bound
from jaxllm.probe import Array, Pass

BACKENDS: tuple[BackendName, ...] = ("jax", "deepspeed")


def one_pass_noise(subject: Subject) -> Iterator[Check]:
    """One pass of both sides in fp32 and in bf16 from the same weights: logits, and the gradients of matrices as one vector.

    These are many numbers, so that chance has no part in it.  Gradients of biases and norm scales are sums over all tokens,
    which torch and XLA round to bf16 at different partial sums; they are left out.
    """
    from jaxllm.parity.levels import OnePass

    exact, rounded = (OnePass.of_run(subject.in_precision(precision), subject.data) for precision in ("fp32", "bf16"))
    for label, batch in exact.inputs.items():
        real = counted(batch, exact.passes["jax"][label].logits)
        exact_pass = {backend: exact.passes[backend][label] for backend in BACKENDS}
        rounded_pass = {backend: rounded.passes[backend][label] for backend in BACKENDS}
        for what, vector in (("logits", partial(_logits, real=real)), ("gradients of matrices", _matrices)):
            own = {backend: distance(vector(rounded_pass[backend]), vector(exact_pass[backend])) for backend in BACKENDS}
            between = distance(vector(rounded_pass["deepspeed"]), vector(rounded_pass["jax"]))
            yield _check(f"{what}, {label}", between, own)


def _logits(one_pass: Pass, real: NDArray[np.bool_]) -> Array:
    """Of every token that is not padding."""
    return one_pass.logits[real].ravel()


def _matrices(one_pass: Pass) -> Array:
    """Gradients of two and more dimensions; how long each part is says how much it matters to a step."""
    return np.concatenate([gradient.ravel() for _, gradient in sorted(one_pass.gradients.items()) if gradient.ndim > 1])


def distance(value: Array, reference: Array) -> float:
    """Of two vectors, relative to the length of the second."""
    wanted = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(value, np.float64) - wanted) / np.linalg.norm(wanted))


def noise(runs: Runs) -> Iterator[Measurement]:
    """Train both backends in fp32 and in bf16 on one device and compare the four runs.

    Any two programs round to 8 bits in different places, so that no figure of its own is a bound for bf16.  The measure is the
    rounding itself: the losses of the backends may be no further apart than each is from those of its own fp32 run.  Most of
    that distance is the rounding of the weights, which both share; what is left is where each rounds its activations.
    Parameters have no bound, for the reason that they have none in fp32; nor have the losses of few steps, see NOISE_STEPS.
    """
    own: dict[BackendName, Comparison] = {}
    for backend in BACKENDS:
        exact = Reference(runs.finished(one_device(backend, "fp32")))
        yield exact.curve("noise")
        own[backend] = exact.compare(runs.finished(one_device(backend, "bf16")), "noise")
        yield own[backend].curve
    rounded = Reference(runs.finished(one_device("jax", "bf16")))
    between = rounded.compare(runs.finished(one_device("deepspeed", "bf16")), "noise")
    yield between.curve
    losses = {backend: root_mean_square(comparison.curve.loss_error) for backend, comparison in own.items()}
    loss = _check("loss of every step", root_mean_square(between.curve.loss_error), losses)
    if runs.steps < NOISE_STEPS:
        loss = replace(loss, bound=math.inf)
    yield loss
    parameters = {backend: root_mean_square(comparison.curve.parameter_distance) for backend, comparison in own.items()}
    apart = root_mean_square(between.curve.parameter_distance)
    yield replace(_check("parameters", apart, parameters), bound=math.inf)
    if not loss.passed:
        yield from _control(runs, rounded, loss.bound)


def _check(what: str, between: float, own: Mapping[BackendName, float]) -> Check:
    """The distance between the backends, bounded by their distances from fp32."""
    beside = f"from fp32: JAX {own['jax']:.1e}, DeepSpeed {own['deepspeed']:.1e}"
    detail = {f"{backend}_from_fp32": each for backend, each in own.items()}
    return Check("noise", "bf16", f"{what}, DeepSpeed against JAX; {beside}", between, noise_bound(own.values()), detail)


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
