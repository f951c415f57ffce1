"""Which attention kernel a run uses."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh

from jaxllm.config.schema import AttentionName
from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.cudnn import check_cudnn, cudnn_attention
from jaxllm.jax_backend.attention.kernel import AttentionKernel
from jaxllm.jax_backend.attention.ring import RING, check_ring, ring_attention
from jaxllm.jax_backend.attention.xla import xla_attention
from jaxllm.jax_backend.precision import Policy

# By JAX's name of the platform, the kernel that `auto` takes where it can.
_FASTEST: Mapping[str, AttentionName] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def kernel_of(wanted: AttentionName, spec: AttentionSpec, length: int, policy: Policy, mesh: Mesh) -> AttentionKernel:
    """The kernel for rows of `length` tokens: the one asked for, or with `auto` the platform's fastest that can do it.

    A mesh that splits the sequence has the ring.  ConfigError when the kernel asked for cannot.
    """
    if mesh.shape[RING] > 1:
        check_ring(spec, wanted, mesh.shape[RING])
        return ring_attention
    platform = mesh.devices.flat[0].platform
    if wanted != "auto":
        return _checked(wanted, spec, length, policy, platform)
    try:
        return _checked(_FASTEST.get(platform, "xla"), spec, length, policy, platform)
    except ConfigError:
        return xla_attention


def _checked(name: AttentionName, spec: AttentionSpec, length: int, policy: Policy, platform: str) -> AttentionKernel:
    if name == "splash":
        from jaxllm.jax_backend.attention.splash import check_splash, splash_attention

        check_splash(spec, length, policy.compute)
        return splash_attention
    if name == "cudnn":
        check_cudnn(spec, policy.compute, platform)
        return cudnn_attention
    return xla_attention
