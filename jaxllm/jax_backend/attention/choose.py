"""Which attention kernel a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
from jax.sharding import Mesh

from jaxllm.config.schema import AttentionName, JaxConfig
from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.jax_backend.attention.blocked import blocked_attention
from jaxllm.jax_backend.attention.cudnn import check_cudnn, cudnn_attention
from jaxllm.jax_backend.attention.kernel import AttentionKernel
from jaxllm.jax_backend.attention.ring import ring_attention
from jaxllm.jax_backend.attention.ring_visits import RING
from jaxllm.jax_backend.attention.xla import xla_attention
from jaxllm.jax_backend.combinations import check_ring
from jaxllm.jax_backend.precision import Policy

# By JAX's name of the platform, the kernel that `auto` takes where it can.
_FASTEST: Mapping[str, AttentionName] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def kernel_of(config: JaxConfig, model: ModelSpec, length: int, policy: Policy, mesh: Mesh) -> AttentionKernel:
    """The kernel for rows of `length` tokens: the one asked for, or with `auto` the platform's fastest that can do it.

    A mesh that splits the sequence has the ring.  ConfigError when the kernel asked for cannot.
    """
    spec = model.attention
    if model.encoder is not None:
        if config.attention not in ("auto", "xla"):
            raise ConfigError("jax.attention", f"{config.attention} cannot do an encoder-decoder's attention; use auto")
        return xla_attention
    device = mesh.devices.flat[0]
    if mesh.shape[RING] > 1:
        check_ring(spec, config.attention, mesh.shape[RING])
        return _ring(config, model, length // (2 * mesh.shape[RING]), policy, device)
    if config.attention != "auto":
        return _checked(config.attention, config.attention_block, spec, length, policy, device)
    if device.platform == "cpu":  # many virtual devices are there to try a mesh: what compiles soonest is best
        return blocked_attention if mesh.size == 1 else xla_attention
    try:
        return _checked(_FASTEST.get(device.platform, "xla"), config.attention_block, spec, length, policy, device)
    except ConfigError:
        return xla_attention


def _ring(config: JaxConfig, model: ModelSpec, chunk: int, policy: Policy, device: jax.Device) -> AttentionKernel:
    """The ring, its visits by splash attention's kernels on TPU or where they are asked for, if they can.  chunk: tokens."""
    from jaxllm.jax_backend.attention.ring_splash import check_splash_ring
    from jaxllm.jax_backend.attention.splash import blocks_for

    if config.attention == "xla" or (config.attention == "auto" and device.platform != "tpu"):
        return ring_attention
    try:
        for spec in model.attentions:
            check_splash_ring(spec, chunk, policy.compute.itemsize)
    except ConfigError:
        if config.attention == "splash":
            raise
        return ring_attention
    return partial(ring_attention, blocks=blocks_for(device.device_kind, 2 * chunk, config.attention_block))


def _checked(
    name: AttentionName, block: int | None, spec: AttentionSpec, length: int, policy: Policy, device: jax.Device
) -> AttentionKernel:
    platform = device.platform
    if name == "splash":
        from jaxllm.jax_backend.attention.splash import blocks_for, check_splash, splash_attention

        check_splash(spec, length, policy.compute)
        return partial(splash_attention, blocks=blocks_for(device.device_kind, length, block))
    if name == "cudnn":
        check_cudnn(spec, policy.compute, platform)
        return cudnn_attention
    if name == "blocked":
        return blocked_attention
    return xla_attention
