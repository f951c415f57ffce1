"""Runtime: how a model is computed (dtypes, layout, kernels), as opposed to what it computes (`ModelSpec`)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.config.loss_chunk import LossChunk
from jaxllm.jax_backend.attention import AttentionKernel, xla_attention
from jaxllm.jax_backend.precision import Policy
from jaxllm.jax_backend.remat import Remat
from jaxllm.jax_backend.sharding import Layout


@dataclass(frozen=True)
class Runtime:
    """policy: dtypes.  layout: where activations live.  remat: what the backward pass recomputes, per layer.

    attention: the kernel that every layer uses.  masters_on_host: parameters wait in the host's memory.  loss_chunk: tokens
    whose logits exist at once, as `training.loss_chunk`.
    """

    policy: Policy
    layout: Layout
    remat: Remat = "none"
    attention: AttentionKernel = xla_attention
    masters_on_host: bool = False
    loss_chunk: LossChunk = "none"
