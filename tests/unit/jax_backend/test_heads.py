"""A classifier on a mesh: the same losses as on one device, and outputs in the order of the rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxllm.data.pipeline import BatchPipeline
from jaxllm.errors import ConfigError
from jaxllm.parity.subject import examine
from jaxllm.schedule import hyper
from tests.parity.tasks import config

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_mesh_equals_one_device_and_keeps_the_order_of_rows(start, tmp_path):
    training = {"steps": 3, "global_batch": 8, "precision": "fp64"}
    examined = examine(config("bert", "single", tmp_path, training=training), tmp_path)
    found = {}
    on_mesh = {"parallel": MESH, "jax": {"cpu_devices": 8}, "training": {**training, "micro_batch": 1}}
    for name, changes in (("one", {"training": training}), ("mesh", on_mesh)):
        run = replace(examined.run, config=config("bert", "single", tmp_path, **changes))
        backend = start(run)
        with BatchPipeline(examined.data, run.config, "train") as batches:
            losses = [float(backend.step(next(batches), hyper(step, step, 3, run.config)).loss) for step in range(3)]
            evaluated = backend.evaluate([batches.batch(number) for number in (5, 6)], outputs=True)
        found[name] = losses, evaluated
    (one_losses, one), (mesh_losses, mesh) = found["one"], found["mesh"]
    assert mesh_losses == pytest.approx(one_losses, rel=1e-12)
    assert mesh.loss_sum == pytest.approx(one.loss_sum, rel=1e-12)
    assert one.outputs.shape == (16, 1, 3)
    np.testing.assert_allclose(mesh.outputs, one.outputs, rtol=1e-10)


def test_sequences_of_encoders_are_not_cut(start, tmp_path):
    described = config("bert", "single", tmp_path, parallel={"data": 1, "context": 2}, jax={"cpu_devices": 8})
    run = replace(examine(described, tmp_path).run, config=described)
    with pytest.raises(ConfigError, match="only causal-lm cuts sequences"):
        start(run)
