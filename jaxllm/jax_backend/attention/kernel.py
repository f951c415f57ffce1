"""The signature that every attention kernel has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime


class AttentionKernel(Protocol):
    """softmax(q k^T scale) v over what each query sees.  B batch, S queries, T keys, H heads, K kv heads, D head_dim."""

    def __call__(
        self,
        query_BSHD: jax.Array,
        key_BTKD: jax.Array,
        value_BTKD: jax.Array,
        visibility: Visibility,
        spec: AttentionSpec,
        runtime: Runtime,
        dropout_key: jax.Array | None,
        /,
    ) -> jax.Array:
        """(B, S, H, D) in the compute dtype, its softmax in the statistics dtype.

        Query head h reads key/value head h * K // H (arXiv:2305.13245).  Only the XLA kernel knows `visibility.bias` and keys
        of other tokens than the queries (`choose.kernel_of` sees to it).  dropout_key: turns on the spec's dropout of the
        weights, where it has any.
        """
        ...
