"""Ring attention against attention in one piece: values and gradients, in float64 to the last digits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.schema import JaxConfig
from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention import Visibility, ring, ring_blocks, xla_attention
from jaxllm.jax_backend.attention.choose import kernel_of
from jaxllm.jax_backend.attention.ring_splash import check_splash_ring
from jaxllm.jax_backend.attention.splash import Blocks
from jaxllm.jax_backend.combinations import check_ring
from jaxllm.jax_backend.cuts import MESH_AXES
from jaxllm.jax_backend.mesh import mesh_of
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout
from jaxllm.jax_backend.zigzag import zigzag
from tests.unit.jax_backend import cases

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 4, 2, 8


def make_spec(**changes):
    return AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, scale=0.3, qkv_bias=False, output_bias=False, **changes)


def make_runtime(precision, **sizes):
    return Runtime(policy_of(precision), Layout(mesh_of({**dict.fromkeys(MESH_AXES, 1), **sizes})))


def make_inputs(scale=1):
    """Query, key, value, the gradient of the output, and segments: documents that end inside and between chunks, padding.

    scale: of every length.
    """
    generator = np.random.default_rng(0)
    length = LENGTH * scale
    shapes = [(BATCH, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    segments = np.ones((BATCH, length), np.int32)
    segments[0, 11 * scale :], segments[0, 24 * scale :] = 2, 0
    segments[1, 7 * scale :], segments[1, 8 * scale :] = 2, 3
    return [generator.normal(size=shape) for shape in shapes], segments


def pull(kernel, runtime, spec, order, arrays, segments):
    """Output and gradients of query, key and value, the rows laid out in `order` and the results put back."""
    query, key, value, gradient = (jnp.asarray(array[:, order], runtime.policy.compute) for array in arrays)
    seen = Visibility(*[jnp.asarray(order)] * 2, *[jnp.asarray(segments[:, order])] * 2)

    @jax.jit
    def both(query, key, value, gradient):
        output, back = jax.vjp(lambda *inputs: kernel(*inputs, seen, spec, runtime, None), query, key, value)
        return output, *back(gradient)

    return [np.asarray(array, np.float64)[:, np.argsort(order)] for array in both(query, key, value, gradient)]


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({"context": 2}, {}),
        ({"context": 4}, {"window": 9, "softcap": 1.5}),
        ({"context": 8}, {}),
        ({"context": 4}, {"causal": False}),
        ({"data": 2, "context": 2, "tensor": 2}, {}),
    ],
)
def test_the_ring_equals_attention_in_one_piece(monkeypatch, sizes, changes):
    # Several blocks of keys to a chunk.
    monkeypatch.setattr(ring_blocks, "SMALLEST_BLOCK", 1)
    monkeypatch.setattr(ring_blocks, "LARGEST_BLOCK", 2)
    arrays, segments = make_inputs()
    spec = make_spec(**changes)
    wanted = pull(xla_attention, make_runtime("fp64"), spec, np.arange(LENGTH), arrays, segments)
    order = zigzag(LENGTH, sizes["context"])
    found = pull(ring.ring_attention, make_runtime("fp64", **sizes), spec, order, arrays, segments)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14 * np.abs(theirs).max() * HEADS)


def test_bf16_is_as_near_to_float64_as_in_one_piece():
    arrays, segments = make_inputs()
    spec, order, plain = make_spec(), zigzag(LENGTH, 4), np.arange(LENGTH)
    exact = pull(xla_attention, make_runtime("fp64"), spec, plain, arrays, segments)
    whole = pull(xla_attention, make_runtime("bf16"), spec, plain, arrays, segments)
    found = pull(ring.ring_attention, make_runtime("bf16", context=4), spec, order, arrays, segments)
    for ours, theirs, wanted in zip(found, whole, exact, strict=True):
        assert np.linalg.norm(ours - wanted) <= 1.25 * np.linalg.norm(theirs - wanted)


@pytest.mark.parametrize("changes", [{}, {"softcap": 1.5}, {"causal": False}])
def test_visits_by_splash_kernels_equal_attention_in_one_piece(changes):
    """In Pallas' interpreter: packed documents, zig-zag order, grouped heads, forward and backward."""
    arrays, segments = make_inputs(scale=16)
    order, spec = zigzag(LENGTH * 16, 2), make_spec(**changes)
    wanted = pull(xla_attention, make_runtime("fp64"), spec, np.arange(LENGTH * 16), arrays, segments)
    splash = partial(ring.ring_attention, blocks=Blocks(128, 128, 128, 128, 128, 128))
    found = pull(splash, make_runtime("fp32", context=2), spec, order, arrays, segments)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < 5e-6 * np.abs(theirs).max()


def test_memory_is_linear_in_the_tokens_of_a_device():
    """Four times the tokens take about four times the memory, and not sixteen, forward and backward."""

    def temporaries(length):
        runtime, spec = make_runtime("fp32", context=4), make_spec()
        order = jnp.asarray(zigzag(length, 4))
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        shapes = [jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]

        def loss(query, key, value, segments):
            seen = Visibility(order, order, segments, segments)
            return ring.ring_attention(query, key, value, seen, spec, runtime, None).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2**16) / temporaries(2**14) < 5


def test_zigzag_gives_every_device_an_early_and_a_late_chunk():
    assert zigzag(16, 2).tolist() == [*range(4), *range(12, 16), *range(4, 8), *range(8, 12)]
    assert zigzag(5, 1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"12 tokens cannot be cut into 2 \* parallel.context = 8 chunks"):
        zigzag(12, 4)


def test_what_a_ring_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"cudnn cannot split a sequence over parallel.context = 2; use auto") as caught:
        check_ring(make_spec(), "cudnn", 2)
    assert caught.value.key == "jax.attention"
    with pytest.raises(ConfigError, match=r"2 cannot be combined with dropout of attention weights") as caught:
        check_ring(make_spec(dropout=0.1), "auto", 2)
    assert caught.value.key == "parallel.context"


@pytest.mark.parametrize(
    ("changes", "chunk", "itemsize", "said"),
    [
        ({"window": 9}, 128, 2, "no window within a ring"),
        ({}, 192, 2, "a multiple of 128 tokens within a ring, not 192"),
        ({}, 128, 8, "fp64"),
    ],
)
def test_what_splash_cannot_do_within_a_ring_is_refused(changes, chunk, itemsize, said):
    with pytest.raises(ConfigError, match=r"jax\.attention") as caught:
        check_splash_ring(make_spec(**changes), chunk, itemsize)
    assert said in str(caught.value)


def test_splash_within_a_ring_is_taken_where_it_is_asked_for():
    model = replace(cases.make_run().model.spec, attentions=(make_spec(),))
    mesh, policy = mesh_of({**dict.fromkeys(MESH_AXES, 1), "context": 2}), policy_of("bf16")
    asked = kernel_of(JaxConfig(attention="splash"), model, 1024, policy, mesh)
    assert asked.func is ring.ring_attention
    assert asked.keywords["blocks"].query == 512
    assert kernel_of(JaxConfig(), model, 1024, policy, mesh) is ring.ring_attention
