"""A vocabulary that the mesh does not divide: filled up on the devices, and nowhere else."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.backend import create_backend
from jaxllm.families import flatten
from jaxllm.jax_backend.checkpoint import read_training_state
from jaxllm.jax_backend.cuts import vocabulary_rows
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from jaxllm.run import on_one_device
from jaxllm.state import Progress
from jaxllm.state.initial import InitialWeights
from tests.unit.jax_backend import cases

ODD = cases.VOCABULARY + 1
PROGRESS = Progress(3, updates=3)
EIGHT = {"cpu_devices": 8}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
    "vocab_size": ODD,
}
MODELS = {
    "untied": {**cases.LLAMA, "vocab_size": ODD},
    "tied": {**cases.GPT2, "vocab_size": ODD},
    "softcap": {**cases.FAMILIES["gemma2"], "vocab_size": ODD},
    # fsdp does not divide the hidden size and takes the vocabulary instead.
    "hidden": {**cases.LLAMA, "hidden_size": 36, "head_dim": 8, "vocab_size": ODD},
    # Masked language models have a bias of the vocabulary's size besides.
    "bert": {"family": "bert", **ENCODER},
    "roberta": {"family": "roberta", **ENCODER},
}
MESHES = {
    "untied": {"data": 2, "fsdp": 2, "tensor": 2},
    "tied": {"data": 1, "fsdp": 2, "tensor": 4},
    "softcap": {"data": 1, "fsdp": 4, "tensor": 2},
    "hidden": {"data": 1, "fsdp": 8},
    "bert": {"data": 2, "fsdp": 2, "tensor": 2},
    "roberta": {"data": 1, "fsdp": 2, "tensor": 4},
}
ROWS = {"untied": 98, "tied": 100, "softcap": 98, "hidden": 104, "bert": 98, "roberta": 100}


def run_of(name, parallel=None, **training):
    training = {"precision": "fp64", "micro_batch": 2 if parallel else 16, **training}
    kind = "masked-lm" if name in ("bert", "roberta") else "causal-lm"
    return cases.make_run(MODELS[name], objective={"kind": kind}, training=training, parallel=parallel or {}, jax=EIGHT)


@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_equals_one_device_and_what_is_added_stays_zero(start, name):
    run, alone = run_of(name, MESHES[name]), run_of(name)
    backend = start(run)
    inner = backend._started
    filled = [path for path, axes in inner.network.axes.items() if "vocab" in axes]
    assert {inner.params[path].shape[inner.network.axes[path].index("vocab")] for path in filled} == {ROWS[name]}
    exported = backend.export(PROGRESS).params
    for tensor in exported.names():
        np.testing.assert_array_equal(exported.read(tensor), InitialWeights(run.model, run.config.seed).read(tensor))

    found, wanted = cases.take_steps(backend, run, range(3)), cases.take_steps(start(alone), alone, range(3))
    assert found.losses == pytest.approx(wanted.losses, rel=1e-12)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-11)
    idle = {tensor for tensor, rule, _ in flatten(run.model.rules) if rule.idle}
    for tensor, values in wanted.params.items():
        if tensor in idle:
            continue
        pair = (cases.without_key_bias(tensor, side) for side in (found.params[tensor], values))
        assert cases.relative(*pair) <= cases.PARAMETER_BOUND, tensor
    for path in filled:
        for leaf in (inner.params[path], inner.moments.exp_avg[path], inner.moments.exp_avg_sq[path]):
            rows = np.moveaxis(np.asarray(leaf), inner.network.axes[path].index("vocab"), 0)
            assert rows[:ODD].any()
            assert not rows[ODD:].any()


@pytest.mark.parametrize("name", ["untied", "bert"])
def test_whatever_stands_in_what_is_added_changes_nothing(start, name):
    """Large numbers planted there are read by nothing: the same losses, gradients and weights, to the last bit."""
    run = run_of(name, MESHES[name])
    clean, planted = start(run), start(run)
    inner = planted._started
    filled = {path: axes.index("vocab") for path, axes in inner.network.axes.items() if "vocab" in axes}
    assert ("head.bias" in filled) == (name == "bert")
    for path, axis in filled.items():
        leaf = inner.params[path]
        rows = np.moveaxis(np.array(leaf), axis, 0)
        rows[ODD:] = 50.0
        inner.params[path] = jax.device_put(np.moveaxis(rows, 0, axis), leaf.sharding)
    found, wanted = (cases.take_steps(backend, run, range(2)) for backend in (planted, clean))
    assert found.losses == wanted.losses
    assert found.norms == wanted.norms
    for part in ("params", "exp_avg", "exp_avg_sq"):
        for tensor, values in getattr(wanted, part).items():
            np.testing.assert_array_equal(getattr(found, part)[tensor], values, err_msg=tensor)
    for path, axis in filled.items():
        assert not np.moveaxis(np.asarray(inner.moments.exp_avg[path]), axis, 0)[ODD:].any()


def test_the_vocabulary_is_cut(start):
    inner = start(run_of("untied", MESHES["untied"]))._started
    assert inner.params["head.kernel"].sharding.spec == PartitionSpec(("fsdp",), ("tensor",))
    assert inner.params["embed.embedding"].sharding.spec == PartitionSpec(("tensor",), ("fsdp",))
    assert vocabulary_rows(ODD, 32, {"tensor": 1, "fsdp": 8}) == ODD
    assert vocabulary_rows(cases.VOCABULARY, 32, {"tensor": 8, "fsdp": 1}) == cases.VOCABULARY


def test_no_text_has_a_token_that_was_added(start):
    backend = start(run_of("untied", MESHES["untied"]))
    reference = start(run_of("untied"))
    found, wanted = (each.decoder(8).prefill([1, 2, 3]) for each in (backend, reference))
    assert found.shape == (ODD,)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_checkpoint_goes_to_any_other_mesh_and_backend(start, tmp_path):
    """Saved with 98 rows, restored with 97 and with 100, and continued by PyTorch."""
    run = run_of("tied", MESHES["untied"])
    backend = start(run)
    trajectory = cases.take_steps(backend, run, range(3))
    backend.save(tmp_path, PROGRESS)
    backend.wait()
    state = read_training_state(tmp_path, run.model)
    for parallel in (MESHES["tied"], None, MESHES["untied"]):
        other = start(run_of("tied", parallel))
        other.restore(tmp_path)
        again = other.export(PROGRESS)
        for saved, read, wanted in (
            (state.params, again.params, trajectory.params),
            (state.exp_avg, again.exp_avg, trajectory.exp_avg),
            (state.exp_avg_sq, again.exp_avg_sq, trajectory.exp_avg_sq),
        ):
            for tensor, values in wanted.items():
                np.testing.assert_array_equal(saved.read(tensor), values)
                np.testing.assert_array_equal(read.read(tensor), values)

    alone = on_one_device(run)
    torch_backend = create_backend("deepspeed")
    torch_backend.start(alone, state)
    found = float(torch_backend.step(cases.make_batch(3), cases.hyper_of(3, run)).loss)
    rest = torch_backend.export(PROGRESS)
    last = cases.take_steps(backend, run, range(3, 4))
    assert relative_error([found], last.losses) <= TOLERANCES["fp64"].trajectory_loss
    for tensor, values in last.params.items():
        pair = (cases.without_key_bias(tensor, side) for side in (rest.params.read(tensor), values))
        assert relative_error(*pair) <= TOLERANCES["fp64"].trajectory_parameters, tensor
    torch_backend.close()


def test_moments_in_the_hosts_memory_are_cut_and_filled_too(start, tmp_path):
    run = cases.make_run(MODELS["untied"], parallel=MESHES["untied"], jax={**EIGHT, "offload_optimizer": "all"})
    backend = start(run)
    trajectory = cases.take_steps(backend, run, range(1))
    backend.save(tmp_path, PROGRESS)
    backend.wait()
    backend.restore(tmp_path)
    for path, leaf in backend._started.moments.exp_avg.items():
        assert leaf.sharding == backend._started.storage.moments[path]
    for tensor, values in trajectory.params.items():
        np.testing.assert_array_equal(backend.export(PROGRESS).params.read(tensor), values)
