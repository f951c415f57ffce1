"""The one table of tolerances.  A test may tighten an entry; nothing relaxes it.

Every bound is relative: the largest difference over the largest magnitude of the reference (`relative_error`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxllm.config.schema import Precision
from jaxllm.families import Model, flatten


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one precision.

    value: logits, loss and every gradient of one pass; for the gradient of an idle parameter see `gradient_error`.
    trajectory_loss, trajectory_parameters: over 1,000 AdamW steps, also
    between meshes, ZeRO stages, process counts and with a switch of backend on the way.
    """

    value: float
    trajectory_loss: float
    trajectory_parameters: float


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp64": Tolerance(value=1e-12, trajectory_loss=1e-12, trajectory_parameters=1e-11),
    # Parameters have no bound of their own in fp32: AdamW turns a rounding error of a tiny gradient into a whole step of the
    # learning rate (the update is m / sqrt(v), whatever their size), so that single elements wander while the loss does not.
    "fp32": Tolerance(value=1e-5, trajectory_loss=1e-5, trajectory_parameters=math.inf),
    # Any two programs round to 8 bits in different places.  What holds for bf16 is a comparison of distances, level `noise`.
    "bf16": Tolerance(value=math.inf, trajectory_loss=math.inf, trajectory_parameters=math.inf),
}

ZERO_GRADIENT = 1e-12
"""A gradient below this fraction of the model's largest is the rounding error of one that is zero.

The case that exists: the bias of GPT-2's keys, which adds the same to all scores of a query, so that softmax takes it out
again.  What is left is noise of about 1e-17, and AdamW's update m / (sqrt(v) + eps) enlarges noise by up to 1 / eps = 1e8.
No two programs agree on it, and no result depends on it: such elements are left out where *updated parameters* are compared,
and nowhere else."""


def has_gradient(size: ArrayLike, largest: float) -> NDArray[np.bool_]:
    """Which elements have a gradient at all.  size: of their gradients, or sqrt of their second moments; largest: of all."""
    return np.abs(np.asarray(size, np.float64)) > ZERO_GRADIENT * largest


def idle_parameters(model: Model) -> frozenset[str]:
    """Parameters that no output depends on (`WeightRule.idle`).

    They are left out where updated parameters are compared: in fp32 the noise of their gradients is too large for
    ZERO_GRADIENT to tell it, and AdamW makes whole steps of it.
    """
    return frozenset(name for name, rule, _ in flatten(model.rules) if rule.idle)


def gradient_error(value: ArrayLike, reference: ArrayLike, largest: float, *, idle: bool) -> float:
    """`relative_error` of a gradient; of an idle parameter's, how far it is from zero in units of the model's largest.

    largest: magnitude among all gradients of the model.

    idle (`WeightRule.idle`): the gradient is zero mathematically.  The case that exists is the bias of BERT's keys, GPT-2's
    case above in a tensor of its own.  Two rounding errors have nothing in common, so that their difference relative to one
    of them says nothing.  What can be said is more than that both are alike: each is zero, beside the gradients that it is
    what is left of.  That holds both sides to the same bound as any other gradient, and finds an error in either, in both
    alike, and a parameter that is called idle and is not.
    """
    if not idle:
        return relative_error(value, reference)
    size = max(float(np.max(np.abs(np.asarray(each, np.float64)), initial=0.0)) for each in (value, reference))
    return size / largest if largest else size


def relative_error(value: ArrayLike, reference: ArrayLike) -> float:
    """Max |value - reference| / max |reference|; the plain difference where the reference is zero everywhere."""
    wanted = np.asarray(reference, np.float64)
    difference = float(np.max(np.abs(np.asarray(value, np.float64) - wanted), initial=0.0))
    scale = float(np.max(np.abs(wanted), initial=0.0))
    return difference / scale if scale else difference


def noise_bound(distances: Iterable[float]) -> float:
    """How far apart the bf16 runs of the backends may be; distances: of each backend from its own fp32 run.

    Their root mean square: each is an estimate, from the same few steps, of what rounding to 8 bits does to this run.  Two
    runs whose roundings had nothing in common would be sqrt(2) times as far apart, and so would a backend that rounds where
    the other does not; what keeps the backends closer is the rounding of the weights, which is the same on both.
    """
    squares = [distance * distance for distance in distances]
    return math.sqrt(sum(squares) / len(squares))


NOISE_STEPS = 50
"""Fewer losses than these have no bound in bf16: rounding moves each by chance, and with it the distances compared."""
