"""Two JAX processes of four devices each, joined over gloo, compute what one process computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxllm.jax_backend import JaxBackend
from jaxllm.jax_backend.checkpoint import read_training_state
from jaxllm.jax_backend.distributed import Rendezvous
from jaxllm.state import Progress
from tests.distributed.jax_cases import MESHES, single_run
from tests.unit.jax_backend.cases import hyper_of, make_batch, read_all, relative

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes left what they found.  Every warning in them is an error, and they print nothing."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    command = [sys.executable, "-W", "error", str(ROOT / "tests/distributed/jax_worker.py"), str(folder)]
    workers = [
        subprocess.Popen(
            command,
            env={**base, **Rendezvous(coordinator, index, 2).environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [worker.communicate(timeout=400)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert outputs == ["", ""]
    return folder


@pytest.fixture(scope="module")
def alone():
    """The same steps on one device of this process."""
    run = single_run()
    backend = JaxBackend()
    backend.start(run, None)
    results = [backend.step(make_batch(step), hyper_of(step, run)) for step in range(3)]
    evaluated = backend.evaluate([make_batch(8), make_batch(9)])
    params = read_all(backend.export(Progress(3)).params)
    backend.step(make_batch(3), hyper_of(3, run))
    decoded = backend.decoder(24).prefill(list(range(20)))
    backend.close()
    losses, norms = ([float(getattr(result, name)) for result in results] for name in ("loss", "gradient_norm"))
    return {"losses": losses, "norms": norms, "evaluation": evaluated, "params": params, "decoded": decoded}


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_equal_one_device(folder, alone, mesh):
    found = np.load(folder / "findings.npz")
    assert found[f"{mesh}/losses"] == pytest.approx(alone["losses"], rel=1e-12)
    assert found[f"{mesh}/norms"] == pytest.approx(alone["norms"], rel=1e-11)
    assert found[f"{mesh}/evaluation"][0] == pytest.approx(alone["evaluation"].loss_sum, rel=1e-12)
    assert found[f"{mesh}/evaluation"][1] == alone["evaluation"].target_tokens
    for name, values in alone["params"].items():
        assert relative(found[f"{mesh}/params/{name}"], values) <= 1e-11, name
    np.testing.assert_allclose(found[f"{mesh}/decoded"], alone["decoded"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_process_reads_its_rows_and_agrees_on_flags(folder, mesh):
    first, second = (json.loads((folder / f"shards-{main}.json").read_text())[mesh] for main in (1, 0))
    share_rows = mesh in ("tensor8", "context8")
    assert (first, second) == (([0, 1], [0, 1]) if share_rows else ([0, 2], [1, 2]))
    # What one process raises, both learn at the next call.
    flags = np.load(folder / "findings.npz")[f"{mesh}/any"]
    assert flags.tolist() == [False, not share_rows, False]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_of_two_processes_is_whole(folder, alone, mesh):
    found = np.load(folder / "findings.npz")
    after, again = found[f"{mesh}/resumed"]
    assert after == again
    state = read_training_state(folder / mesh, single_run().model)
    assert state.progress == Progress(3, 3, 48, 1000)
    for name in alone["params"]:
        np.testing.assert_array_equal(state.params.read(name), found[f"{mesh}/params/{name}"])


def test_the_environment_is_described(folder):
    described = json.loads((folder / "device.json").read_text())
    assert described["devices"] == 8
    assert described["processes"] == 2
