"""Orbax checkpoints: onto another mesh, while training goes on, and read without any mesh."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxllm.errors import CheckpointError
from jaxllm.jax_backend.checkpoint import read_progress, read_training_state
from jaxllm.state import Progress
from tests.unit.jax_backend import cases

PROGRESS = Progress(step=3, updates=3, samples=48, tokens=999)
EIGHT = {"parallel": {"data": 2, "fsdp": 2, "tensor": 2}, "jax": {"cpu_devices": 8}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint written by eight devices after three steps, and what was in it."""
    from jaxllm.jax_backend import JaxBackend

    folder = tmp_path_factory.mktemp("checkpoint")
    run = cases.make_run(**EIGHT)
    backend = JaxBackend()
    backend.start(run, None)
    trajectory = cases.take_steps(backend, run, range(3))
    backend.save(folder, PROGRESS)
    backend.wait()
    after = cases.take_steps(backend, run, range(3, 5))
    backend.close()
    return folder, trajectory, after


def assert_same(state, trajectory):
    for reader, wanted in (
        (state.params, trajectory.params), (state.exp_avg, trajectory.exp_avg), (state.exp_avg_sq, trajectory.exp_avg_sq)
    ):  # fmt: skip
        assert list(reader.names()) == list(wanted)
        for name, values in wanted.items():
            np.testing.assert_array_equal(reader.read(name), values)


def test_it_continues_bit_for_bit_on_the_same_mesh(start, saved):
    folder, trajectory, after = saved
    run = cases.make_run(**EIGHT)
    backend = start(run)
    backend.restore(folder)
    assert_same(backend.export(PROGRESS), trajectory)
    again = cases.take_steps(backend, run, range(3, 5))
    assert again.losses == after.losses
    for name, values in after.params.items():
        np.testing.assert_array_equal(again.params[name], values)


@pytest.mark.parametrize(
    "mesh", [{}, {"parallel": {"data": 1, "fsdp": 8}, "jax": {"cpu_devices": 8}}], ids=["one-device", "fsdp8"]
)
def test_it_is_restored_onto_another_mesh(start, saved, mesh):
    folder, trajectory, after = saved
    run = cases.make_run(**mesh)
    backend = start(run)
    backend.step(cases.make_batch(7), cases.hyper_of(0, run))
    backend.restore(folder)
    for path, leaf in backend._started.params.items():
        assert leaf.sharding == backend._started.storage.params[path]
    assert_same(backend.export(PROGRESS), trajectory)
    assert cases.take_steps(backend, run, range(3, 5)).losses == pytest.approx(after.losses, rel=1e-5)


def test_weights_alone_are_restored_without_an_optimizer(start, saved):
    folder, trajectory, _ = saved
    backend = start(cases.make_run(), training=False)
    backend.restore(folder)
    state = backend.export(PROGRESS)
    assert state.exp_avg is None
    for name, values in trajectory.params.items():
        np.testing.assert_array_equal(state.params.read(name), values)


def test_it_is_read_without_a_mesh(saved):
    folder, trajectory, _ = saved
    state = read_training_state(folder, cases.make_run().model)
    assert state.progress == PROGRESS == read_progress(folder)
    assert_same(state, trajectory)
    name = state.params.names()[1]
    cut = tuple(slice(1, 3) for _ in state.params.shape(name))
    np.testing.assert_array_equal(state.params.read(name, cut), trajectory.params[name][cut])


def test_float64_and_fused_tensors_are_read_without_a_mesh(start, tmp_path):
    run = cases.make_run(cases.GPT2, training={"precision": "fp64"})
    backend = start(run)
    trajectory = cases.take_steps(backend, run, range(1))
    backend.save(tmp_path, PROGRESS)
    backend.wait()
    state = read_training_state(tmp_path, run.model)
    assert state.params.read("transformer.h.0.attn.c_attn.weight").dtype == np.float64
    assert_same(state, trajectory)


def test_steps_taken_while_it_is_written_do_not_reach_it(start, tmp_path):
    """The step donates the very buffers that are being saved."""
    run = cases.make_run({**cases.LLAMA, "hidden_size": 256, "intermediate_size": 1024})
    backend = start(run)
    trajectory = cases.take_steps(backend, run, range(1))
    backend.save(tmp_path, PROGRESS)
    for step in range(1, 4):
        backend.step(cases.make_batch(step), cases.hyper_of(step, run))
    backend.wait()
    assert_same(read_training_state(tmp_path, run.model), trajectory)


def test_a_second_save_waits_for_the_first(start, tmp_path):
    run = cases.make_run()
    backend = start(run)
    for step in range(2):
        (tmp_path / str(step)).mkdir()
        backend.save(tmp_path / str(step), Progress(step))
    backend.wait()
    assert [read_progress(tmp_path / str(step)).step for step in range(2)] == [0, 1]


def test_what_is_no_checkpoint_is_refused(start, saved, tmp_path):
    run = cases.make_run()
    with pytest.raises(CheckpointError, match="not a JAX checkpoint"):
        read_training_state(tmp_path, run.model)
    backend = start(run)
    with pytest.raises(CheckpointError, match="not a JAX checkpoint"):
        backend.restore(tmp_path)
    # A refused restore leaves the backend as it was.
    assert np.isfinite(float(backend.step(cases.make_batch(), cases.hyper_of(0, run)).loss))
    other = cases.make_run({**cases.LLAMA, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match="belongs to another model"):
        read_training_state(saved[0], other.model)
    backend = start(other)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        backend.restore(saved[0])


def test_the_metadata_is_json(saved):
    folder, _, _ = saved
    metadata = json.loads((folder / "jax_state" / "_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"]["progress"] == PROGRESS.to_json()
