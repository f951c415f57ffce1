"""Blocked attention against the XLA path, forward and backward, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxllm.jax_backend.attention import blocked, cache_visibility, sequence_visibility, xla_attention
from jaxllm.jax_backend.attention.blocked import blocked_attention
from jaxllm.jax_backend.cuts import MESH_AXES
from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from tests.unit.jax_backend.test_splash import arrays, spec_of

LENGTH = 150  # two whole blocks and a part


def forward_and_backward(kernel, spec, precision="fp64", mesh=None, length=LENGTH):
    runtime = Runtime(policy_of(precision), Layout(mesh or single_device_mesh()))
    query, key, value, cotangent, segments = arrays(spec.head_dim, length)
    query, key, value, cotangent = (x.astype(runtime.policy.compute) for x in (query, key, value, cotangent))

    def attend(query, key, value):
        return kernel(
            query, key, value, sequence_visibility(segments, jnp.arange(length, dtype=jnp.int32)), spec, runtime, None
        )

    mixed, pull = jax.vjp(jax.jit(attend), query, key, value)
    return jax.device_get((mixed, *pull(cotangent)))


def assert_same(found, wanted, bound):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) <= bound


@pytest.mark.parametrize(
    "spec",
    [spec_of(), spec_of(softcap=3.0), spec_of(window=100), spec_of(window=7), spec_of(causal=False)],
    ids=["causal", "softcap", "window", "narrow window", "bidirectional"],
)
def test_blocked_equals_xla(spec):
    found, wanted = (forward_and_backward(kernel, spec) for kernel in (blocked_attention, xla_attention))
    assert_same(found, wanted, TOLERANCES["fp64"].value)


@pytest.mark.parametrize("scores", [2 * 64 * 150, 2 * 2 * 64 * 150], ids=["one at once", "two at once"])
def test_long_rows_wait_for_blocks_before(monkeypatch, scores):
    monkeypatch.setattr(blocked, "MOST_SCORES", scores)
    monkeypatch.setattr(blocked, "MOST_KEYS", 40)
    spec = spec_of(window=100)
    found, wanted = (forward_and_backward(kernel, spec) for kernel in (blocked_attention, xla_attention))
    assert_same(found, wanted, TOLERANCES["fp64"].value)


def test_long_rows_hold_few_blocks_at_once(monkeypatch):
    """Left to itself, XLA keeps the weights of all blocks until it has multiplied each by the gradients of the outputs."""
    in_order = bytes_of_backward_pass(2048)
    monkeypatch.setattr(blocked, "MOST_SCORES", 2**40)
    assert in_order < 0.75 * bytes_of_backward_pass(2048)


def bytes_of_backward_pass(length):
    spec, runtime = spec_of(), Runtime(policy_of("fp32"), Layout(single_device_mesh()))
    shapes = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in arrays(spec.head_dim, 64)]

    def backward(query, key, value, cotangent, segments):
        visibility = sequence_visibility(segments, np.arange(length, dtype=np.int32))
        pull = jax.vjp(lambda *x: blocked_attention(*x, visibility, spec, runtime, None), query, key, value)[1]
        return pull(cotangent)

    return jax.jit(backward).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_single_precision_is_single_precision():
    found, wanted = (forward_and_backward(kernel, spec_of(), "fp32") for kernel in (blocked_attention, xla_attention))
    assert_same(found, wanted, TOLERANCES["fp32"].value)


def test_bf16_is_no_further_from_double_precision_than_xla():
    wanted = forward_and_backward(xla_attention, spec_of())
    errors = {}
    for kernel in (blocked_attention, xla_attention):
        found = forward_and_backward(kernel, spec_of(), "bf16")
        assert all(x.dtype == jnp.bfloat16 for x in found)
        errors[kernel] = [
            np.linalg.norm(x.astype(np.float64) - y) / np.linalg.norm(y) for x, y in zip(found, wanted, strict=True)
        ]
    assert all(ours <= 1.2 * theirs for ours, theirs in zip(*errors.values(), strict=True))


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_sharded_over_rows_and_heads(precision):
    sizes = {**dict.fromkeys(MESH_AXES, 1), "fsdp": 2, "tensor": 2}
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=jax.devices()[:4])
    found = forward_and_backward(blocked_attention, spec_of(), precision, mesh)
    wanted = forward_and_backward(blocked_attention, spec_of(), precision)
    assert_same(found, wanted, TOLERANCES["fp64"].value)


def test_what_is_hidden_is_not_computed():
    """Blocks above the diagonal are left out: of 8 blocks of keys, a query block sees half on average."""

    def operations(spec):
        runtime = Runtime(policy_of("fp32"), Layout(single_device_mesh()))
        query, key, value, _, segments = arrays(spec.head_dim, 1024)
        visibility = sequence_visibility(segments, jnp.arange(1024, dtype=jnp.int32))
        jaxpr = jax.make_jaxpr(lambda *x: blocked_attention(*x, visibility, spec, runtime, None))(query, key, value)
        return str(jaxpr).count("dot_general"), _multiplications(jaxpr.jaxpr)

    (dots, causal), (whole_dots, whole) = operations(spec_of()), operations(spec_of(causal=False))
    assert whole_dots == 8 * 2
    assert dots == (7 * 2 + 1) * 2  # the keys of the diagonal and those before it
    assert causal == pytest.approx(whole * 9 / 16)


def _multiplications(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += sum(_multiplications(inner) for inner in jaxprs_in_params(equation.params))
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            inputs = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(np.prod([inputs[axis] for axis in contracted]))
    return total


def test_a_cache_is_left_to_xla():
    runtime = Runtime(policy_of("fp64"), Layout(single_device_mesh()))
    query, key, value, _, _ = (x.astype(jnp.float64) for x in arrays(32, 64))
    visibility = cache_visibility(jnp.int32(7), 1, 64)
    found = blocked_attention(query[:, :1], key, value, visibility, spec_of(), runtime, None)
    np.testing.assert_array_equal(found, xla_attention(query[:, :1], key, value, visibility, spec_of(), runtime, None))
