"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) in torch's order of operations, as an optax transformation.

Stock optax differs from torch.optim.AdamW: its bias correction is computed on the device in float32 (1e-5 off at the first
step) and its clipping has no epsilon.  Here everything that is a scalar comes from the host in double precision, and each
tensor operation is the one torch does, in the same order, so that both optimisers round alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jaxllm.backend import Hyper
from jaxllm.config.schema import OptimizerConfig
from jaxllm.jax_backend.network import Params

LeafT = TypeVar("LeafT")
NO_RATES: Mapping[str, NDArray[np.float64]] = MappingProxyType({})


class Moments(NamedTuple, Generic[LeafT]):
    """First and second moments by Flax path, in the master dtype."""

    exp_avg: dict[str, LeafT]
    exp_avg_sq: dict[str, LeafT]


class StepScalars(NamedTuple):
    """What changes from step to step, in the master dtype: arrays, so that no step compiles anew.

    step_size: learning rate / bias correction 1.  keep: 1 - learning rate * weight decay.  sqrt_correction2: the square root
    of bias correction 2.
    """

    step_size: Any
    keep: Any
    sqrt_correction2: Any


def step_scalars(hyper: Hyper, config: OptimizerConfig, dtype: np.dtype) -> StepScalars:
    """The scalars of one step, computed in double and rounded once."""
    return StepScalars(
        step_size=np.asarray(hyper.learning_rate / hyper.bias_correction1, dtype),
        keep=np.asarray(1.0 - hyper.learning_rate * config.weight_decay, dtype),
        sqrt_correction2=np.asarray(math.sqrt(hyper.bias_correction2), dtype),
    )


def _lerp(start: jax.Array, end: jax.Array, weight: float) -> jax.Array:
    """torch.lerp, which interpolates from the nearer end."""
    return start + weight * (end - start) if weight < 0.5 else end - (end - start) * (1.0 - weight)


def adamw(
    config: OptimizerConfig, decays: Mapping[str, bool], rates: Mapping[str, NDArray[np.float64]] = NO_RATES
) -> optax.GradientTransformationExtraArgs:
    """AdamW over a flat dict of parameters; `update` takes the step's `scalars` and `finite` as extra arguments.

    decays: whether a parameter (by Flax path) decays.  rates: what its learning rate is multiplied by, where that is not 1.
    The updates are differences: applied with `optax.apply_updates` they give the new parameter to within a unit in the last
    place.  Where `finite` (a boolean scalar, true by default) is not, nothing changes.
    """
    beta1, beta2 = config.betas

    def init(params: Params) -> Moments[jax.Array]:
        exp_avg, exp_avg_sq = ({path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in params.items()} for _ in range(2))
        return Moments(exp_avg, exp_avg_sq)

    def one(
        path: str, p: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, scalars: StepScalars, finite: jax.Array | bool
    ) -> tuple[jax.Array, ...]:
        if path in rates:
            rate = jnp.asarray(rates[path], p.dtype)
            scalars = scalars._replace(step_size=scalars.step_size * rate, keep=1.0 - (1.0 - scalars.keep) * rate)
        new = p * scalars.keep if decays[path] and config.weight_decay else p
        # Chosen before the parameter is computed from them: if they are chosen after, XLA:CPU computes moments twice and
        # copies all old ones to be able to.
        m = jnp.where(finite, _lerp(m, g, 1.0 - beta1), m)
        v = jnp.where(finite, v * beta2 + ((1.0 - beta2) * g) * g, v)
        new = new + (-scalars.step_size * m) / (jnp.sqrt(v) / scalars.sqrt_correction2 + config.eps)
        return jnp.where(finite, new - p, -0.0), m, v  # x + -0.0 is x, whatever its sign

    def update(
        updates: Params,
        state: Moments[jax.Array],
        params: Params | None = None,
        *,
        scalars: StepScalars,
        finite: jax.Array | bool = True,
        **_: Any,
    ) -> tuple[Params, Moments[jax.Array]]:
        if params is None:
            raise ValueError("AdamW needs the parameters: weight decay depends on them")
        new = {
            path: one(path, params[path], state.exp_avg[path], state.exp_avg_sq[path], gradient, scalars, finite)
            for path, gradient in updates.items()
        }
        change, exp_avg, exp_avg_sq = ({path: leaf[i] for path, leaf in new.items()} for i in range(3))
        return change, Moments(exp_avg, exp_avg_sq)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_factor(norm: jax.Array, limit: float | None) -> jax.Array:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of global norm `norm` by: min(1, limit / (norm + 1e-6))."""
    if limit is None:
        return jnp.ones_like(norm)
    return jnp.minimum(jnp.ones_like(norm), limit / (norm + 1e-6))
