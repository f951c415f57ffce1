"""Logits, loss and gradients against transformers: 1e-12 in true float64, 1e-5 in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.families.rope import RopeSpec, inverse_frequencies
from jaxllm.jax_backend.mesh import create_mesh
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.model.transformer import Text
from jaxllm.jax_backend.network import build_network
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout, parameter_shardings
from jaxllm.jax_backend.step import DeviceBatch, loss_and_gradients
from jaxllm.jax_backend.weights import LiveWeights, load_params
from tests.unit.jax_backend import cases

BOUND = {"fp64": 1e-12, "fp32": 1e-5}

VARIANTS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 500000.0}}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-erf-gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu", "n_inner": 40}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
}


class Side:
    """Our side of the comparison: the reference's weights in our model on one device."""

    def __init__(self, model, precision, reference=None, remat="none"):
        self.mesh = create_mesh(cases.make_run().config)
        self.model = model
        self.network = build_network(model.spec, Runtime(policy_of(precision), Layout(self.mesh), remat))
        self.shardings = parameter_shardings(model.rules, self.mesh)
        self.params = load_params(
            reference or cases.Reference(model, precision), model.rules, self.shardings, self.network.runtime.policy.master
        )

    def logits(self, batch):
        apply = jax.jit(lambda params: self.network.bind(params)(Text(batch.inputs, batch.positions, batch.segments)))
        return np.asarray(apply(self.network.cast(self.params)))

    def gradients(self, batch):
        fields = (batch.inputs, batch.targets, batch.weights, batch.positions, batch.segments)
        device_batch = DeviceBatch(*(jnp.asarray(field[None]) for field in fields))
        compute = jax.jit(lambda p: loss_and_gradients(self.network, self.shardings, p, device_batch, lambda _: None))
        metrics, gradients = compute(self.params)
        return float(metrics.loss), LiveWeights(gradients, self.model.rules, self.mesh)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [*((variant, "fp64") for variant in VARIANTS), ("llama", "fp32"), ("llama-biases", "fp32"), ("gpt2", "fp32")],
)
def test_logits_loss_and_gradients_equal_transformers(variant, precision):
    family, option = VARIANTS[variant]
    model = cases.resolve({**cases.FAMILIES[family], **option})
    reference = cases.Reference(model, precision)
    ours = Side(model, precision, reference)
    batch = cases.make_batch(rows=3, length=48)
    wanted_loss = reference.loss(batch)
    wanted_loss.backward()
    loss, gradients = ours.gradients(batch)
    assert cases.relative(ours.logits(batch), reference.logits(batch).detach().numpy()) <= BOUND[precision]
    assert abs(loss - wanted_loss.item()) <= BOUND[precision] * abs(wanted_loss.item())
    distances = {name: cases.relative(gradients.read(name), wanted) for name, wanted in reference.gradients().items()}
    assert max(distances.values()) <= BOUND[precision], sorted(distances.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_long_sequences_catch_position_errors(family, precision):
    model = cases.resolve(cases.FAMILIES[family])
    reference = cases.Reference(model, precision)
    batch = cases.make_batch(rows=1, length=700, packed=False)
    ours = Side(model, precision, reference).logits(batch)
    wanted = reference.logits(batch).detach().numpy()
    assert cases.relative(ours, wanted) <= BOUND[precision]
    assert cases.relative(ours[:, -50:], wanted[:, -50:]) <= BOUND[precision]


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_rotary_frequencies_are_transformers_to_the_last_bits(theta, head_dim):
    import torch
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with torch.no_grad():
        wanted = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = inverse_frequencies(RopeSpec(theta), head_dim, 1, np.dtype(np.float32))
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, wanted, maxulp=1)


def test_padding_gives_no_nan():
    model = cases.resolve(cases.LLAMA)
    ours = Side(model, "fp32")
    batch = cases.make_batch(rows=2, length=16)
    batch.segments[1] = 0
    batch.weights[1] = 0.0
    loss, gradients = ours.gradients(batch)
    assert np.isfinite(ours.logits(batch)).all()
    assert np.isfinite(loss)
    assert all(np.isfinite(gradients.read(name)).all() for name in gradients.names())


def test_documents_of_a_packed_row_do_not_see_each_other():
    ours = Side(cases.resolve(cases.LLAMA), "fp64")
    packed = cases.make_batch(rows=1, length=24)
    logits = ours.logits(packed)
    for segment in np.unique(packed.segments[packed.segments > 0]):
        part = packed.segments[0] == segment
        fields = ((name, getattr(packed, name)) for name in packed.__dataclass_fields__)
        alone = type(packed)(**{name: None if rows is None else rows[:, part] for name, rows in fields})
        assert cases.relative(logits[:, part], ours.logits(alone)) <= 1e-12


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    model = cases.resolve(cases.LLAMA)
    batch = cases.make_batch(rows=2, length=32)
    exact, rounded = Side(model, "fp32", cases.Reference(model, "fp32")), Side(model, "bf16")
    assert rounded.logits(batch).dtype == jnp.bfloat16
    assert 1e-4 < cases.relative(rounded.logits(batch).astype(np.float32), exact.logits(batch)) < 3e-2
    loss, gradients = rounded.gradients(batch)
    wanted_loss, wanted = exact.gradients(batch)
    assert abs(loss - wanted_loss) < 1e-2 * wanted_loss
    assert gradients.read(gradients.names()[0]).dtype == np.float32
    assert max(cases.relative(gradients.read(name), wanted.read(name)) for name in wanted.names()) < 0.1


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_nothing(remat):
    model = cases.resolve(cases.LLAMA)
    batch = cases.make_batch(rows=2, length=32)
    loss, gradients = Side(model, "fp64").gradients(batch)
    again, recomputed = Side(model, "fp64", remat=remat).gradients(batch)
    assert again == pytest.approx(loss, rel=1e-14)
    assert max(cases.relative(recomputed.read(name), gradients.read(name)) for name in gradients.names()) <= 1e-13


def test_recomputing_saves_fewer_activations():
    model = cases.resolve({**cases.LLAMA, "num_hidden_layers": 8})
    batch = cases.make_batch(rows=8, length=128)

    def saved_bytes(remat: str) -> int:
        side = Side(model, "fp32", remat=remat)
        fields = (batch.inputs, batch.targets, batch.weights, batch.positions, batch.segments)
        device_batch = DeviceBatch(*(jnp.asarray(field[None]) for field in fields))
        compute = jax.jit(lambda p: loss_and_gradients(side.network, side.shardings, p, device_batch, lambda _: None))
        return int(compute.lower(side.params).compile().memory_analysis().temp_size_in_bytes)

    none, full, dots = (saved_bytes(remat) for remat in ("none", "full", "dots"))
    assert full < dots < none
