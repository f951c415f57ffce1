"""The module's parameters are those of the family's table of weight rules: paths, shapes, logical axes, dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxllm.families import flax_leaves
from jaxllm.jax_backend.mesh import create_mesh
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.network import build_network
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout
from tests.unit.jax_backend import cases

LLAMA_OPTIONS = [
    {"attention_bias": attention_bias, "mlp_bias": mlp_bias, "tie_word_embeddings": tied, "num_key_value_heads": kv_heads}
    for attention_bias, mlp_bias, tied, kv_heads in itertools.product((False, True), (False, True), (False, True), (1, 4))
]
GPT2_OPTIONS = [
    {"tie_word_embeddings": tied, "n_inner": inner, "activation_function": activation}
    for tied, inner, activation in itertools.product((False, True), (None, 40), ("gelu_new", "relu"))
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parameter_is_as_its_rule_says(family):
    base, options = (cases.LLAMA, LLAMA_OPTIONS) if family == "llama" else (cases.GPT2, GPT2_OPTIONS)
    mesh = create_mesh(cases.make_run().config)
    for option in options:
        model = cases.resolve({**base, **option})
        network = build_network(model.spec, Runtime(policy_of("fp64"), Layout(mesh)))
        # A fused query, key and value has one pattern for all three, whose heads are as many.
        same = {"kv_heads": "heads"} if model.spec.attention.kv_heads == model.spec.attention.heads else {}
        named = lambda axes: tuple(same.get(axis, axis) for axis in axes)  # noqa: B023, E731
        expected = {leaf.path: (leaf.shape, named(leaf.axes)) for leaf in flax_leaves(model.rules)}
        found = {path: (shape.shape, named(network.axes[path])) for path, shape in network.shapes.items()}
        assert found == expected, option
        assert {shape.dtype for shape in network.shapes.values()} == {np.dtype(np.float64)}


def test_layers_are_stacked_and_scanned():
    shapes = {
        layers: build_network(
            cases.resolve({**cases.LLAMA, "num_hidden_layers": layers}).spec,
            Runtime(policy_of("fp32"), Layout(create_mesh(cases.make_run().config))),
        ).shapes
        for layers in (1, 5)
    }
    assert shapes[1].keys() == shapes[5].keys()
    assert shapes[5]["layers.attention.query.kernel"].shape == (5, 32, 4, 8)
