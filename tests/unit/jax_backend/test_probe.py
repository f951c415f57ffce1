"""JaxProbe: what it sees is what training computes, and looking changes nothing.

B batch, S sequence, E hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.backend import create_probe
from jaxllm.data.batch import Batch
from jaxllm.errors import BackendError
from jaxllm.families import flatten, module_points
from jaxllm.families.initialization import initial_values
from jaxllm.jax_backend.model.tap import LAYERS, Recorder
from jaxllm.jax_backend.probe import JaxProbe
from jaxllm.jax_backend.step import loss_sum
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from jaxllm.probe import layer_points, point_names
from jaxllm.state import Progress, TrainingState
from jaxllm.state.initial import InitialWeights
from tests.unit.jax_backend import cases

# Norms before, around and after what a layer computes.  Every family's points are checked by `parity --find`.
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
BOUND = TOLERANCES["fp64"].value
ROWS, LENGTH = 6, 24


class Nudged:
    """The initial weights of a run, in float64, with a little noise so that no bias is zero and no scale is one."""

    def __init__(self, run):
        generator = np.random.default_rng(5)
        initial = InitialWeights(run.model, run.config.seed)
        self._values = {
            name: initial.read(name) + 0.1 * generator.standard_normal(initial.shape(name)) for name in initial.names()
        }

    def names(self):
        return list(self._values)

    def shape(self, name):
        return self._values[name].shape

    def read(self, name, index=None):
        return self._values[name][tuple(index)] if index is not None else self._values[name]


def batch_of(rows: int = ROWS) -> Batch:
    return cases.make_batch(rows=rows, length=LENGTH)


def run_of(family: str, precision: str = "fp64", **sections):
    training = {"precision": precision, "global_batch": ROWS, **sections.pop("training", {})}
    return cases.make_run(cases.FAMILIES[family], training=training, **sections)


_PROBES: dict[tuple[str, str], JaxProbe] = {}


def probe_of(family: str, precision: str = "fp64") -> JaxProbe:
    """A probe with nudged weights; kept, so that its programs compile once for all tests."""
    if (family, precision) not in _PROBES:
        probe = JaxProbe()
        run = run_of(family, precision)
        probe.load(run, Nudged(run))
        _PROBES[family, precision] = probe
    return _PROBES[family, precision]


def loss_with_offsets(probe: JaxProbe, batch: Batch):
    """The loss of a batch as a function of what is added at each point, by the names of `jaxllm.probe`."""
    loaded = probe._loaded
    micro = jax.tree.map(lambda leaf: leaf[0], probe._place(batch, batch.rows))

    @jax.jit
    def loss(offsets):
        recorder = Recorder(offsets)
        used = loaded.network.cast(loaded.params)
        return loss_sum(loaded.network, used, micro, None, recorder) / batch.target_tokens, recorder.records()

    zeros = jax.tree.map(lambda point: np.zeros(point.shape), jax.eval_shape(loss, {})[1])

    def of(point: str, offset):
        if not point.startswith(LAYERS):
            return float(loss({**zeros, point: offset})[0])
        _, layer, name = point.split(".")
        stacked = zeros[LAYERS][name].copy()
        stacked[int(layer)] = offset
        return float(loss({**zeros, LAYERS: {**zeros[LAYERS], name: stacked}})[0])

    return of


@FAMILIES
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_looking_changes_nothing(family, precision):
    probe, batch = probe_of(family, precision), batch_of()
    blind, seeing = probe.passes(batch), probe.passes(batch, capture=True)
    bound = TOLERANCES[precision].value
    assert blind.values == {}
    assert blind.cotangents == {}
    assert seeing.loss == pytest.approx(blind.loss, rel=bound)
    assert relative_error(seeing.logits, blind.logits) <= bound
    assert list(seeing.gradients) == list(blind.gradients) == [name for name, _, _ in flatten(probe._loaded.run.model.rules)]
    for name, gradient in blind.gradients.items():
        assert relative_error(seeing.gradients[name], gradient) <= bound, name


@FAMILIES
def test_every_point_is_there_in_order_with_its_shape(family):
    probe = probe_of(family)
    spec = probe._loaded.run.model.spec
    seen = probe.passes(batch_of(), capture=True)
    assert tuple(seen.values) == tuple(seen.cotangents) == point_names(spec)
    attention = spec.attention
    last = {
        "query": (attention.heads, attention.head_dim),
        "key": (attention.kv_heads, attention.head_dim),
        "value": (attention.kv_heads, attention.head_dim),
        "logits": (spec.vocab_size,),
    }
    for point, value in seen.values.items():
        wanted = (ROWS, LENGTH, *last.get(point.rpartition(".")[2], (spec.hidden_size,)))
        assert value.shape == seen.cotangents[point].shape == wanted
        assert value.dtype == seen.cotangents[point].dtype == np.float64
        assert np.abs(seen.cotangents[point]).max() > 0
    np.testing.assert_array_equal(seen.values["logits"], seen.logits)


@FAMILIES
def test_the_residual_stream_adds_up(family):
    probe = probe_of(family)
    values = probe.passes(batch_of(), capture=True).values
    entering = values["embedding"]
    spec = probe._loaded.run.model.spec
    for layer in range(spec.layers):
        at = {point: values[f"layers.{layer}.{point}"] for point in layer_points(spec)}
        attended, mlp = (at.get(f"{part}_output_norm", at[f"{part}_output"]) for part in ("attention", "mlp"))
        assert relative_error(at["attention_residual"], entering + attended) <= BOUND
        assert relative_error(at["residual"], at["attention_residual"] + mlp) <= BOUND
        entering = at["residual"]


@FAMILIES
def test_values_are_those_of_transformers(family):
    """Hidden states and logits of the reference that everybody trusts, in true float64."""
    run = run_of(family)
    reference = cases.Reference(run.model, "fp64")
    probe = JaxProbe()
    probe.load(run, reference)
    batch = batch_of(rows=2)
    values = probe.passes(batch, capture=True).values
    wanted = reference.logits(batch).detach().numpy()
    assert relative_error(values["logits"], wanted) <= BOUND
    # Every norm of transformers is a module, whose output a hook can see.
    seen = {}
    norms = {point: place for point, place in module_points(run.model).items() if point.endswith("norm")}
    assert len(norms) >= 2 * run.model.spec.layers + 1
    for point, place in norms.items():
        module = reference.module.get_submodule(place.module)
        module.register_forward_hook(lambda _m, _i, output, point=point: seen.update({point: output.detach().numpy()}))
    reference.logits(batch)
    assert seen.keys() == norms.keys()
    for point, output in seen.items():
        assert relative_error(values[point], output) <= BOUND, point


@FAMILIES
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_the_cotangent_of_the_logits_is_that_of_softmax(family, precision):
    """(softmax(logits) - one-hot(target)) * weight / tokens."""
    batch = batch_of()
    seen = probe_of(family, precision).passes(batch, capture=True)
    logits = seen.logits.astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    shares -= np.eye(logits.shape[-1])[batch.targets]
    wanted = shares * batch.weights[..., None] / batch.target_tokens
    assert relative_error(seen.cotangents["logits"], wanted) <= TOLERANCES[precision].value


@FAMILIES
def test_cotangents_are_the_slopes_of_the_loss(family):
    """Finite differences in float64 at every point, along a random direction."""
    probe, batch = probe_of(family), batch_of()
    seen = probe.passes(batch, capture=True)
    loss = loss_with_offsets(probe, batch)
    assert loss("logits", np.zeros(seen.logits.shape)) == pytest.approx(seen.loss, rel=BOUND)
    generator = np.random.default_rng(1)
    for point, cotangent in seen.cotangents.items():
        direction = generator.standard_normal(cotangent.shape)
        step = 1e-4 / np.linalg.norm(direction)
        # Richardson: what is left of the central difference's error is of the fourth order.
        coarse, fine = (
            (loss(point, size * step * direction) - loss(point, -size * step * direction)) / (2 * size * step)
            for size in (2.0, 1.0)
        )
        slope, wanted = (4 * fine - coarse) / 3, float(np.sum(cotangent * direction))
        scale = np.linalg.norm(cotangent) * np.linalg.norm(direction)
        assert abs(slope - wanted) <= 1e-6 * scale / np.sqrt(cotangent.size), point


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cotangents_and_values_give_the_gradients(family):
    """The gradient of a kernel is what went in, transposed, times the cotangent of what came out: all are of one pass."""
    probe = probe_of(family)
    seen = probe.passes(batch_of(), capture=True)
    spec = probe._loaded.run.model.spec
    value_name, output_name, transposed = {
        "llama": ("model.layers.{}.self_attn.v_proj.weight", "model.layers.{}.mlp.down_proj.weight", True),
        "gpt2": ("transformer.h.{}.attn.c_attn.weight", "transformer.h.{}.mlp.c_proj.bias", False),
    }[family]
    for layer in range(spec.layers):
        normed = seen.values[f"layers.{layer}.attention_norm"]
        cotangent = seen.cotangents[f"layers.{layer}.value"].reshape(ROWS, LENGTH, -1)
        found = np.einsum("bse,bsd->ed", normed, cotangent)
        wanted = seen.gradients[value_name.format(layer)]
        wanted = wanted.T if transposed else wanted[:, -spec.hidden_size :]
        assert relative_error(found, wanted) <= BOUND
        if family == "gpt2":
            summed = seen.cotangents[f"layers.{layer}.mlp_output"].sum((0, 1))
            assert relative_error(summed, seen.gradients[output_name.format(layer)]) <= BOUND


@FAMILIES
def test_micro_batches_change_nothing_but_rounding(family):
    """Six rows in micro-batches of four: the second is filled up, and logits come back for the six rows in order."""
    batch = batch_of()
    run = run_of(family, training={"micro_batch": 4})
    probe = JaxProbe()
    probe.load(run, Nudged(run))
    found, wanted = probe.passes(batch), probe_of(family).passes(batch)
    assert found.logits.shape == wanted.logits.shape == (ROWS, LENGTH, cases.VOCABULARY)
    assert relative_error(found.logits, wanted.logits) <= BOUND
    assert found.loss == pytest.approx(wanted.loss, rel=BOUND)
    for name, gradient in wanted.gradients.items():
        assert relative_error(found.gradients[name], gradient) <= BOUND, name
    assert probe.passes(batch, capture=True).logits.shape == found.logits.shape


@FAMILIES
def test_after_step_is_the_first_step_of_training(family, start):
    run = run_of(family)
    batch, hyper = batch_of(), cases.hyper_of(0, run)
    backend = start(run, TrainingState(Progress(), Nudged(run)))
    backend.step(batch, hyper)
    trained = cases.read_all(backend.export(Progress(1)).params)
    probe = probe_of(family)
    before = probe.passes(batch_of())
    for _ in range(2):
        found = probe.after_step(batch, hyper)
        assert found.keys() == trained.keys()
        for name, values in trained.items():
            np.testing.assert_array_equal(found[name], values)
    # The loaded weights are still the ones that were loaded.
    np.testing.assert_array_equal(probe.passes(batch_of()).logits, before.logits)


@FAMILIES
def test_gradients_are_those_that_training_takes_its_norm_of(family, start):
    run = run_of(family, optimizer={"clip_norm": 0.05})
    result = start(run, TrainingState(Progress(), Nudged(run))).step(batch_of(), cases.hyper_of(0, run))
    gradients = probe_of(family).passes(batch_of()).gradients
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    assert float(result.gradient_norm) == pytest.approx(norm, rel=BOUND)


@FAMILIES
def test_bfloat16_comes_out_as_float32_and_is_bfloat16_inside(family):
    seen = probe_of(family, "bf16").passes(batch_of(), capture=True)
    exact = probe_of(family, "fp32").passes(batch_of(), capture=True)
    arrays = [seen.logits, *seen.gradients.values(), *seen.values.values(), *seen.cotangents.values()]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    for point, value in seen.values.items():
        np.testing.assert_array_equal(value, value.astype(jnp.bfloat16).astype(np.float32))
        assert 1e-5 < relative_error(value, exact.values[point]) < 0.1, point


def test_dropout_is_off():
    dropped = {**cases.GPT2, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    run = cases.make_run(dropped, training={"precision": "fp64", "global_batch": ROWS})
    probe = JaxProbe()
    probe.load(run, Nudged(run))
    hyper = cases.hyper_of(0, run)
    found, wanted = probe.after_step(batch_of(), hyper), probe_of("gpt2").after_step(batch_of(), hyper)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
    np.testing.assert_array_equal(probe.passes(batch_of()).logits, probe_of("gpt2").passes(batch_of()).logits)


def test_one_device_whatever_the_mesh_and_the_layers_recomputed():
    run = run_of("llama", parallel={"data": 1, "fsdp": 4, "tensor": 2}, jax={"cpu_devices": 8, "remat": "full"})
    probe = JaxProbe()
    probe.load(run, Nudged(run))
    assert {device for leaf in probe._loaded.params.values() for device in leaf.devices()} == {jax.devices()[0]}
    found, wanted = (each.passes(batch_of(), capture=True) for each in (probe, probe_of("llama")))
    for point, value in wanted.values.items():
        assert relative_error(found.values[point], value) <= BOUND
        assert relative_error(found.cotangents[point], wanted.cotangents[point]) <= BOUND


def test_everything_compiles_once():
    run = run_of("llama")
    probe = JaxProbe()
    probe.load(run, Nudged(run))
    for seed in range(2):
        batch = cases.make_batch(seed, rows=ROWS, length=LENGTH)
        probe.passes(batch)
        probe.passes(batch, capture=True)
        probe.after_step(batch, cases.hyper_of(seed, run))
    loaded = probe._loaded
    programs = (loaded.gradients, loaded.logits, loaded.capture, loaded.zero_moments, loaded.train_step)
    assert [program._cache_size() for program in programs] == [1] * 5


def test_loading_again_replaces_the_weights():
    run = run_of("gpt2", "fp32")
    probe = create_probe("jax")
    assert probe.name == "jax"
    with pytest.raises(BackendError, match="call load first"):
        probe.passes(batch_of())
    losses = []
    for seed in (1, 2):
        probe.load(run, InitialWeights(run.model, seed))
        losses.append(probe.passes(batch_of()).loss)
    assert losses[0] != losses[1]
    name, rule, _ = next(flatten(run.model.rules))
    hyper = replace(cases.hyper_of(0, run), learning_rate=0.0)
    np.testing.assert_array_equal(
        probe.after_step(batch_of(), hyper)[name], initial_values(rule.init, 2, name, rule.shape)
    )  # fmt: skip
