"""Attention kernels: functions of one signature, chosen in `Runtime`, that differ in how they compute and not in what.

What a query may see is described (`Visibility` and the layer's AttentionSpec) and not drawn, so that a kernel need never hold
a mask of queries x keys.
"""

from jaxllm.jax_backend.attention.kernel import AttentionKernel
from jaxllm.jax_backend.attention.visibility import (
    Visibility,
    cache_visibility,
    sequence_visibility,
    source_visibility,
    visible,
)
from jaxllm.jax_backend.attention.xla import xla_attention

__all__ = [
    "AttentionKernel",
    "Visibility",
    "cache_visibility",
    "sequence_visibility",
    "source_visibility",
    "visible",
    "xla_attention",
]
