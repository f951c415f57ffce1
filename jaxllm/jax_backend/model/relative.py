"""Biases of distances, learned for each head and shared by the layers of a stack (arXiv:1910.10683, section 2.1).

Shape legend: H heads, S queries, T keys, D = S + T - 1 distances.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.families.relative import distance_buckets
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.model.linear import Embedding
from jaxllm.jax_backend.model.runtime import Runtime


class RelativeBias(nnx.Module):
    """What is added to the scores of whole rows."""

    def __init__(self, spec: AttentionSpec, runtime: Runtime) -> None:
        if spec.relative is None:
            raise ValueError("this attention has no biases of distances")
        self.table = Embedding(spec.relative.buckets, spec.heads, ("buckets", "heads"), runtime)
        self.relative = spec.relative
        self.causal = spec.causal
        self.runtime = runtime

    def __call__(self, queries: int, keys: int) -> jax.Array:
        """(H, S, T) in the compute dtype, for the first `queries` and the first `keys` tokens of a row."""
        cycle = queries + keys - 1
        distances_D = (np.arange(cycle) + queries - 1) % cycle - (queries - 1)  # 0, 1, ..., then the negative ones
        dtype = self.runtime.policy.statistics.type
        buckets_D = distance_buckets(distances_D, self.relative, causal=self.causal, dtype=dtype)
        bias_HD = self.table(jnp.asarray(buckets_D)).T
        # Row i reads from place -i of the cycle on: S cycles one after another, cut into rows that are one shorter.  Looking
        # up every pair of tokens instead would make the gradient a scatter of S x T values.
        heads = bias_HD.shape[0]
        cycles = jnp.broadcast_to(bias_HD[:, None], (heads, queries, cycle)).reshape(heads, -1)
        rows = cycles[:, : queries * (cycle - 1)].reshape(heads, queries, cycle - 1) if queries > 1 else cycles[:, None]
        return self.runtime.layout.constrain(rows[..., :keys], "heads", None, None)
