"""Splash attention against the XLA path, forward and backward, in Pallas' interpreter; and which kernel a run gets."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxllm.config.schema import JaxConfig
from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention import cache_visibility, sequence_visibility, xla_attention
from jaxllm.jax_backend.attention.blocked import blocked_attention
from jaxllm.jax_backend.attention.choose import kernel_of
from jaxllm.jax_backend.attention.cudnn import check_cudnn, cudnn_attention
from jaxllm.jax_backend.attention.splash import Blocks, blocks_for, check_splash, splash_attention
from jaxllm.jax_backend.cuts import MESH_AXES
from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout
from tests.unit.jax_backend import cases

ROWS, LENGTH, HEADS, KV_HEADS = 2, 256, 4, 2
SMALL = Blocks(128, 128, 128, 128, 128, 128)


def spec_of(head_dim=32, **changes):
    return AttentionSpec(HEADS, KV_HEADS, head_dim, head_dim**-0.5, qkv_bias=False, output_bias=False, **changes)


def arrays(head_dim, length=LENGTH):
    random = np.random.default_rng(0)
    shapes = [(ROWS, length, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    query, key, value, cotangent = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    # Packed rows: documents of several lengths, padding (segment 0) at the end of the second row.
    segments = np.sort(random.integers(1, 5, (ROWS, length)), axis=1)
    segments[1, -50:] = 0
    return query, key, value, cotangent, jnp.asarray(segments, jnp.int32)


def forward_and_backward(kernel, runtime, spec, **options):
    query, key, value, cotangent, segments = arrays(spec.head_dim)

    def attend(query, key, value):
        visibility = sequence_visibility(segments, np.arange(LENGTH, dtype=np.int32))
        return kernel(query, key, value, visibility, spec, runtime, None, **options)

    mixed, pull = jax.vjp(jax.jit(attend), query, key, value)
    return mixed, *pull(cotangent)


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        scale = float(jnp.max(jnp.abs(other)))
        assert float(jnp.max(jnp.abs(one - other))) < 5e-6 * scale


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        (spec_of(), SMALL),
        (spec_of(head_dim=80), None),  # not a multiple of the 128 lanes
        (spec_of(head_dim=128, softcap=30.0), SMALL),
        (spec_of(window=100), SMALL),
        (spec_of(causal=False), SMALL),
        (spec_of(), Blocks(256, 256, 128, 128, 256, 128, fused=True)),
    ],
    ids=["blocks", "head_dim 80", "softcap", "window", "bidirectional", "fused backward"],
)
def test_splash_equals_xla(spec, blocks):
    runtime = Runtime(policy_of("fp32"), Layout(single_device_mesh()))
    found = forward_and_backward(splash_attention, runtime, spec, blocks=blocks)
    assert_close(found, forward_and_backward(xla_attention, runtime, spec))


def test_sharded_over_rows_and_heads():
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    mesh = jax.make_mesh(
        tuple(sizes[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=jax.devices()[:4],
    )
    runtime, single = (Runtime(policy_of("fp32"), Layout(m)) for m in (mesh, single_device_mesh()))
    found = forward_and_backward(splash_attention, runtime, spec_of())
    assert_close([jax.device_get(x) for x in found], forward_and_backward(xla_attention, single, spec_of()))


def test_a_cache_is_left_to_xla():
    runtime = Runtime(policy_of("fp32"), Layout(single_device_mesh()))
    query, key, value, _, _ = arrays(32)
    visibility = cache_visibility(jnp.int32(7), 1, LENGTH)
    found = splash_attention(query[:, :1], key, value, visibility, spec_of(), runtime, None)
    np.testing.assert_array_equal(found, xla_attention(query[:, :1], key, value, visibility, spec_of(), runtime, None))


def test_cudnn_is_told_what_may_be_seen():
    runtime = Runtime(policy_of("fp32"), Layout(single_device_mesh()))
    spec = spec_of(window=100)
    assert_close(forward_and_backward(cudnn_attention, runtime, spec), forward_and_backward(xla_attention, runtime, spec))


def test_auto_takes_the_platforms_own():
    mesh = single_device_mesh()
    model = replace(cases.make_run().model.spec, attentions=(spec_of(),))
    assert kernel_of(JaxConfig(), model, LENGTH, policy_of("bf16"), mesh) is blocked_attention
    wanted = JaxConfig(attention="xla")
    assert kernel_of(wanted, model, LENGTH, policy_of("bf16"), mesh) is xla_attention
    asked = kernel_of(JaxConfig(attention="splash", attention_block=256), model, 384, policy_of("bf16"), mesh)
    assert asked.func is splash_attention
    assert asked.keywords["blocks"].query == 128  # the largest that divides the row


def test_blocks_are_of_the_generation_and_divide_the_row():
    assert blocks_for("TPU v6 lite", 8192).query == 2048
    assert blocks_for("TPU v5", 8192, 512).back_key == 512
    assert blocks_for("TPU v5", 1280) == Blocks(640, 640, 128, 640, 640, 128)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: check_splash(spec_of(), 100, np.dtype(np.float32)), "divisible by 128, not 100"),
        (lambda: check_splash(spec_of(dropout=0.1), 128, np.dtype(np.float32)), "no dropout of attention weights (0.1)"),
        (lambda: check_splash(spec_of(), 128, np.dtype(np.float64)), "fp64"),
        (lambda: check_cudnn(spec_of(), jnp.dtype(jnp.bfloat16), "cpu"), "this is cpu"),
        (lambda: check_cudnn(spec_of(), np.dtype(np.float32), "gpu"), "bf16"),
        (lambda: check_cudnn(spec_of(head_dim=256), jnp.dtype(jnp.bfloat16), "gpu"), "not 256"),
        (lambda: check_cudnn(spec_of(softcap=30.0), jnp.dtype(jnp.bfloat16), "gpu"), "soft cap"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(check, said):
    with pytest.raises(ConfigError, match=r"jax\.attention") as caught:
        check()
    assert said in str(caught.value)
