"""What the compiled step sends between devices, and what it holds: read from the program of every kind of mesh."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.jax_backend import JaxBackend
from jaxllm.jax_backend.optimizer import step_scalars
from jaxllm.planning.tpu.hlo import parse
from jaxllm.planning.tpu.program import read_program
from tests.unit.jax_backend import cases

LAYERS = 3
MODEL = {**cases.LLAMA, "num_hidden_layers": LAYERS}
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "fsdp4-tensor2": {"data": 1, "fsdp": 4, "tensor": 2},
    "context4": {"data": 1, "context": 4},
}
SCALARS = 64  # bytes: losses, norms and counts


# Only what is sent matters here, not how long it takes.
UNCOSTED = SimpleNamespace(kernel=lambda *_: (0.0, 0.0), collective=lambda *_: (0.0, 0.0), transfer=lambda *_: 0.0)


@pytest.fixture(scope="module")
def compiled():
    """By mesh: the collectives of a step, the bytes of its arguments on a device, and the bytes of each whole parameter.

    Under "copied": moments that are copied in any of them.
    """
    found = {"copied": []}
    for name, parallel in MESHES.items():
        run = cases.make_run(MODEL, parallel=parallel, jax={"cpu_devices": 8})
        backend = JaxBackend()
        backend.start(run, None)
        inner = backend._started
        scalars = step_scalars(cases.hyper_of(0, run), run.config.optimizer, np.dtype(np.float32))
        batch = inner.feed(cases.make_batch())
        program = inner.train_step.lower(inner.params, inner.moments, batch, scalars, np.uint32(0)).compile()
        text = program.as_text()
        moments = re.findall(r"%(\S+) = .* parameter\(\d+\).*op_name=\"moments\.", text)
        assert len(moments) == 2 * len(inner.params)
        found["copied"] += [moment for moment in moments if f" copy(%{moment})" in text]
        read = read_program(parse(text), dict(inner.mesh.shape), UNCOSTED)
        sizes = {path: leaf.nbytes for path, leaf in inner.params.items()}
        found[name] = (read.collectives, program.memory_analysis().argument_size_in_bytes, sizes)
        backend.close()
    return found


def large(collectives):
    return [each for each in collectives if each.size > SCALARS]


def test_data_only_sums_gradients_once(compiled):
    collectives, _, sizes = compiled["data8"]
    assert {(each.kind, each.axes) for each in collectives} == {("all-reduce", "data")}
    summed = sum(each.size * each.times for each in large(collectives))
    assert summed == pytest.approx(sum(sizes.values()), rel=0.01)


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4-tensor2"])
def test_a_device_holds_its_share_of_parameters_and_moments(compiled, mesh):
    _, held, sizes = compiled[mesh]
    batch = 16 * 32 * 5 * 4 / (8 if mesh == "fsdp8" else 4)
    assert held - batch <= 3 * sum(sizes.values()) / 8 * 1.06  # norms are not cut by tensor


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4-tensor2"])
def test_weights_are_gathered_one_layer_at_a_time(compiled, mesh):
    """The seven matrices and two norms of a layer, forward and backward, inside the loop; outside of it never a stack."""
    collectives, _, sizes = compiled[mesh]
    gathers = [each for each in collectives if each.kind == "all-gather" and each.axes == "fsdp"]
    assert gathers
    of_a_layer = max(size / LAYERS for path, size in sizes.items() if path.startswith("layers."))
    for each in gathers:
        assert each.size <= (of_a_layer if each.times == LAYERS else sizes["embed.embedding"]), each
    for phase in ("forward", "backward"):
        count = Counter(each.times for each in gathers if each.phase == phase)
        assert count[LAYERS] == 9
        assert set(count) <= {1, LAYERS}
    whole = sum(each.size * each.times for each in gathers if each.phase == "forward")
    tensor = 2 if mesh == "fsdp4-tensor2" else 1
    assert whole <= sum(sizes.values()) / tensor * 1.05


def test_fsdp_talks_along_fsdp_alone(compiled):
    collectives, _, _ = compiled["fsdp8"]
    assert {each.axes for each in collectives} == {"fsdp"}
    # Tokens and the gradients of their vectors meet in the embedding's backward pass, once.
    assert {each.kind for each in collectives if each.times == LAYERS} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert {(each.kind, each.source) for each in collectives if each.kind == "all-to-all"} <= {("all-to-all", "embedding")}


def test_tensor_gathers_tokens_before_products_and_sums_after_them(compiled):
    """Two of each in a layer's forward pass: before and after attention, before and after the MLP."""
    collectives, _, _ = compiled["fsdp4-tensor2"]
    forward = [each for each in collectives if each.axes == "tensor" and each.phase == "forward" and each.times == LAYERS]
    count = Counter(each.kind for each in forward)
    assert count["all-gather"] == 2
    assert count["all-reduce"] + count["reduce-scatter"] == 2
    residual = 16 / 4 * 32 * 32 * 4  # bytes of the residual stream of a device's rows
    assert {each.size for each in forward} == {residual}


def test_context_sends_keys_round_and_gathers_nothing(compiled):
    """Three moves of keys and values forward; backward three again, and four of their gradients."""
    collectives, _, sizes = compiled["context4"]
    assert {(each.kind, each.axes) for each in collectives} == {("collective-permute", "context"), ("all-reduce", "context")}
    keys = 16 * 32 / 4 * 2 * 8 * 4  # bytes of a device's keys: rows, tokens, kv heads, head_dim
    moves = Counter()
    for each in collectives:
        if each.kind == "collective-permute" and each.size == keys:
            moves[each.phase] += each.times
    assert moves == {"forward": LAYERS * 2 * 3, "backward": LAYERS * (2 * 3 + 2 * 4)}
    summed = sum(each.size * each.times for each in large(collectives) if each.kind == "all-reduce")
    assert summed == pytest.approx(sum(sizes.values()), rel=0.01)


def test_moments_are_updated_in_place(compiled):
    assert not compiled["copied"]
