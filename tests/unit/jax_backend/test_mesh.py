"""Meshes: what is refused, what is sharded, and that every mesh computes what one device computes."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.jax_backend.mesh import create_mesh, mesh_sizes, over_slices, placed
from jaxllm.jax_backend.sharding import parameter_shardings
from jaxllm.parity.tolerances import TOLERANCES
from tests.unit.jax_backend import cases

MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "fsdp4-tensor2": {"data": 1, "fsdp": 4, "tensor": 2},
    "data2-fsdp2-tensor2": {"data": -1, "fsdp": 2, "tensor": 2},
    "context2": {"data": 1, "context": 2},
    "context4": {"data": 1, "context": 4},
    "context8": {"data": 1, "context": 8},
    "fsdp2-context2-tensor2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
EIGHT = {"cpu_devices": 8}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_mesh_equals_one_device(start, family, capfd):
    model = cases.FAMILIES[family]
    run = cases.make_run(model, training={"precision": "fp64"})
    wanted = cases.take_steps(start(run), run, range(3))
    for name, parallel in MESHES.items():
        if family == "gpt2" and len(parallel) < 3:  # those that combine axes
            continue
        run = cases.make_run(model, training={"precision": "fp64", "micro_batch": 2}, parallel=parallel, jax=EIGHT)
        backend = start(run)
        found = cases.take_steps(backend, run, range(3))
        assert found.losses == pytest.approx(wanted.losses, rel=1e-12), name
        assert found.norms == pytest.approx(wanted.norms, rel=1e-11), name
        for tensor, values in wanted.params.items():
            pair = (cases.without_key_bias(tensor, side) for side in (found.params[tensor], values))
            assert cases.relative(*pair) <= cases.PARAMETER_BOUND, (name, tensor)
    # The partitioner complains there when it has to make a tensor whole that should stay in shards.
    assert capfd.readouterr().err == ""


def test_meshes_equal_one_device_in_fp32_too(start):
    run = cases.make_run()
    wanted = cases.take_steps(start(run), run, range(3))
    for name in ("data8", "fsdp2-context2-tensor2"):
        run = cases.make_run(training={"micro_batch": 2}, parallel=MESHES[name], jax=EIGHT)
        found = cases.take_steps(start(run), run, range(3))
        assert found.losses == pytest.approx(wanted.losses, rel=TOLERANCES["fp32"].trajectory_loss), name
        assert found.norms == pytest.approx(wanted.norms, rel=TOLERANCES["fp32"].value), name


@pytest.mark.parametrize(
    ("attention", "mesh"), [(0.2, "data2-fsdp2-tensor2"), (0.0, "fsdp2-context2-tensor2")]
)  # fmt: skip
def test_dropout_is_the_same_on_every_mesh(start, attention, mesh):
    dropped = {**cases.GPT2, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": attention}
    losses = []
    for parallel in ({"data": 1}, MESHES[mesh]):
        run = cases.make_run(dropped, training={"precision": "fp64"}, parallel=parallel, jax=EIGHT)
        losses.append(float(start(run).step(cases.make_batch(), cases.hyper_of(0, run)).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4-tensor2"])
def test_shards_really_are_shards(start, mesh):
    run = cases.make_run(parallel=MESHES[mesh], jax=EIGHT)
    backend = start(run)
    backend.step(cases.make_batch(), cases.hyper_of(0, run))
    inner = backend._started
    total = held = 0
    for path, leaf in [*inner.params.items(), *inner.moments.exp_avg.items(), *inner.moments.exp_avg_sq.items()]:
        assert leaf.sharding == inner.storage.params[path]
        total += leaf.nbytes
        held += sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.device == jax.devices()[3])
    # Norm scales are cut by fsdp alone; everything else by every axis of the mesh.
    assert held <= total / 8 * 1.05


def test_parameters_are_cut_as_the_table_says():
    run = cases.make_run(cases.GPT2, parallel={"data": 1, "fsdp": 4, "tensor": 2}, jax=EIGHT)
    shardings = parameter_shardings(run.model.rules, create_mesh(run.config))
    specs = {path: sharding.spec for path, sharding in shardings.items()}
    assert specs["embed.embedding"] == PartitionSpec(("tensor",), ("fsdp",))
    assert specs["layers.attention.query.kernel"] == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert specs["layers.attention.output.kernel"] == PartitionSpec(None, ("tensor",), None, ("fsdp",))
    assert specs["layers.mlp.up.kernel"] == PartitionSpec(None, ("fsdp",), ("tensor",))
    # No hidden dimension: fsdp takes the largest axis that it divides beside tensor.
    assert specs["layers.mlp.up.bias"] == PartitionSpec(None, ("tensor", "fsdp"))
    assert specs["layers.attention.query.bias"] == PartitionSpec(None, ("tensor",), ("fsdp",))


@pytest.mark.parametrize(
    ("model", "parallel", "key", "message"),
    [
        ({}, {"data": 4}, "parallel", "the mesh data 4 needs 4 devices but there are 1"),
        ({}, {"data": 1, "fsdp": 2, "tensor": 2}, "parallel", "the mesh fsdp 2 x tensor 2 needs 4 devices but there are 1"),
    ],
)
def test_impossible_meshes_are_refused_on_one_device(start, model, parallel, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        start(cases.make_run({**cases.LLAMA, **model}, parallel=parallel))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("model", "parallel", "key", "message"),
    [
        ({}, {"fsdp": 3}, "parallel", "fsdp 3 does not divide the 8 devices"),
        ({}, {"tensor": 8}, "parallel.tensor", r"8 does not divide the number of attention heads \(heads = 4\)"),
        ({"num_key_value_heads": 1}, {"tensor": 2}, "parallel.tensor", "2 does not divide the number of key/value heads"),
        ({"intermediate_size": 50}, {"tensor": 4, "fsdp": 2}, "parallel.tensor", "4 does not divide the MLP's inner size"),
        ({}, {"expert": 2}, "parallel.expert", "2 is not possible, the model has no experts; set it to 1"),
        (
            {"attention_dropout": 0.1},
            {"context": 2},
            "parallel.context",
            "2 cannot be combined with dropout of attention weights",
        ),
    ],
)
def test_impossible_meshes_are_refused_on_eight_devices(start, model, parallel, key, message):
    keys = {**cases.LLAMA, "num_key_value_heads": 4, **model}
    with pytest.raises(ConfigError, match=message) as caught:
        start(cases.make_run(keys, parallel={"data": -1, **parallel}, jax=EIGHT))
    assert caught.value.key == key


def test_rows_that_context_cannot_cut_are_refused(start):
    with pytest.raises(ConfigError, match="36 tokens cannot be cut into") as caught:
        start(cases.make_run(data={"sequence_length": 36}, parallel={"data": 1, "context": 4}, jax=EIGHT))
    assert caught.value.key == "data.sequence_length"


def test_a_smaller_mesh_takes_the_first_devices(start):
    run = cases.make_run(parallel={"data": 2}, jax=EIGHT)
    assert create_mesh(run.config).devices.ravel().tolist() == jax.devices()[:2]


def test_more_cpu_devices_than_the_process_has_are_refused(start):
    with pytest.raises(ConfigError, match="already runs with 8 CPU devices") as caught:
        start(cases.make_run(jax={"cpu_devices": 16}, parallel={"data": -1}))
    assert caught.value.key == "jax.cpu_devices"


def test_data_takes_the_rest():
    sizes = mesh_sizes(cases.make_run(parallel={"data": -1, "fsdp": 2}).config.parallel, 8)
    assert sizes == {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}


def test_slices_are_cut_along_the_outermost_axes():
    """Two slices of 2 x 2 x 2 chips, as JAX shows them: data lies across them, fsdp and tensor within, along their links."""
    chips = [(x, y, z) for z in range(2) for y in range(2) for x in range(2)]
    devices = [
        SimpleNamespace(platform="tpu", device_kind="TPU v5", slice_index=at, coords=chip, core_on_chip=0, process_index=at)
        for at in (1, 0)
        for chip in chips
    ]
    found = placed((2, 4, 1, 1, 2), devices)
    assert [{device.slice_index for device in half.flat} for half in found] == [{0}, {1}]
    for pair in found.reshape(-1, 2):
        assert sum(a != b for a, b in zip(pair[0].coords, pair[1].coords, strict=True)) == 1
    assert over_slices((2, 4, 1, 1, 2), 4) == ((2, 2, 1, 1, 1), (1, 2, 1, 1, 2))


def test_gradients_of_sharded_parameters_are_never_whole(start):
    """The compiled step gathers one layer's weights at a time, never the stack of all layers."""
    run = cases.make_run({**cases.LLAMA, "num_hidden_layers": 6}, parallel={"data": 1, "fsdp": 8}, jax=EIGHT)
    backend = start(run)
    inner = backend._started
    from jaxllm.jax_backend.optimizer import step_scalars

    scalars = step_scalars(cases.hyper_of(0, run), run.config.optimizer, np.dtype(np.float32))
    batch = inner.feed(cases.make_batch())
    text = inner.train_step.lower(inner.params, inner.moments, batch, scalars, np.uint32(0)).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
    assert gathers
    for path, shape in inner.network.shapes.items():
        if path.startswith("layers.") and len(shape.shape) > 2:
            whole = "[" + ",".join(map(str, shape.shape)) + "]"
            assert not [line for line in gathers if line.split(" = ")[1].startswith(f"f32{whole}")], path
