"""Which dtype each kind of number has: the precision row of the numerical contract, as data."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.schema import Precision


@dataclass(frozen=True)
class Policy:
    """Dtypes of one precision.

    master: parameters, moments, the optimiser's arithmetic.  compute: parameters at use, activations.  statistics: norm
    statistics, softmax, rotary angles, loss, and the accumulation of gradients over micro-batches.  matmul: how exactly a
    product is computed; TPUs and GPUs compute float32 products in bfloat16 or TF32 unless told otherwise.
    """

    master: np.dtype
    compute: np.dtype
    statistics: np.dtype
    matmul: jax.lax.Precision


def policy_of(precision: Precision) -> Policy:
    """The dtypes of `training.precision`."""
    float32, float64, bfloat16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.float64), jnp.dtype(jnp.bfloat16)
    return {
        "fp32": Policy(float32, float32, float32, jax.lax.Precision.HIGHEST),
        "bf16": Policy(float32, bfloat16, float32, jax.lax.Precision.DEFAULT),
        "fp64": Policy(float64, float64, float64, jax.lax.Precision.HIGHEST),
    }[precision]
