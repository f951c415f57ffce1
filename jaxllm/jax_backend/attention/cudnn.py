"""Attention on NVIDIA GPUs: cuDNN's fused attention (arXiv:2205.14135), which never writes the scores to memory.

Elsewhere the same call computes in plain XLA, so that tests reach all but cuDNN itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility, visible
from jaxllm.jax_backend.remat import ATTENTION_MIXED, named

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime

_LARGEST_HEAD = 128  # of the backward kernel on every architecture since Ampere


def cudnn_attention(
    query_BSHD: jax.Array,
    key_BTKD: jax.Array,
    value_BTKD: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    dropout_key: jax.Array | None,  # noqa: ARG001 - refused by check_cudnn
) -> jax.Array:
    """As `AttentionKernel`.  The kernel knows causal masks and windows; documents it gets as a drawn mask."""
    on_gpu = runtime.layout.platform in ("gpu", "cuda")
    mixed: jax.Array = jax.nn.dot_product_attention(
        query_BSHD,
        key_BTKD,
        value_BTKD,
        mask=visible(visibility, spec)[:, None],
        scale=spec.scale,
        implementation="cudnn" if on_gpu else "xla",
    )
    return named(mixed, ATTENTION_MIXED)


def check_cudnn(spec: AttentionSpec, dtype: np.dtype, platform: str) -> None:
    """ConfigError for what the kernel cannot do: other than bf16, wide or odd heads, soft caps, dropout of the weights."""
    if platform not in ("gpu", "cuda"):
        raise ConfigError("jax.attention", f"cudnn runs on NVIDIA GPUs, and this is {platform}; use auto or xla")
    if dtype.itemsize != 2:
        raise ConfigError("jax.attention", "cudnn computes in bf16; set training.precision to bf16 or use xla")
    if spec.head_dim % 8 or spec.head_dim > _LARGEST_HEAD:
        raise ConfigError(
            "jax.attention",
            f"cudnn takes heads of a multiple of 8 up to {_LARGEST_HEAD} dimensions, not {spec.head_dim}; use xla",
        )
    if spec.softcap is not None or spec.dropout:
        what = "a soft cap of the scores" if spec.softcap is not None else f"attention dropout of {spec.dropout}"
        raise ConfigError("jax.attention", f"cudnn cannot do this model's {what}; use xla")
