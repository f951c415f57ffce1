"""An encoder-decoder on a mesh, with dropout, and what it refuses; biases of distances against transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from jaxllm.data.pipeline import BatchPipeline
from jaxllm.errors import ConfigError
from jaxllm.families import resolve_model, task_of
from jaxllm.families.relative import distance_buckets
from jaxllm.families.spec import RelativeSpec
from jaxllm.parity.subject import examine
from jaxllm.schedule import hyper
from jaxllm.torch_backend.float64 import true_float64
from tests.parity.tasks import MODELS, config

ONE: dict[str, Any] = {"training": {"steps": 3, "global_batch": 8, "precision": "fp64"}}
MESHES = {
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp8": {"data": 1, "fsdp": 8},
    "tensor4": {"data": 1, "tensor": 4},
}


def on_mesh(name: str) -> dict[str, Any]:
    training = {**ONE["training"], "micro_batch": 8 if name == "tensor4" else 1}
    return {"parallel": MESHES[name], "jax": {"cpu_devices": 8}, "training": training}


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return examine(config("t5", "seq2seq", folder, **ONE), folder)


def losses_of(start, run, data) -> list[float]:
    backend = start(run)
    with BatchPipeline(data, run.config, "train") as batches:
        return [float(backend.step(next(batches), hyper(step, step, 3, run.config)).loss) for step in range(3)]


def with_config(examined, changes: dict[str, Any], **model: Any):
    """The run with sections changed; keys of the model, too."""
    described = config("t5", "seq2seq", examined.data.folder.parent, **changes)
    keys = {**MODELS["t5"], "dropout_rate": 0.0, **model}
    described = described.model_copy(update={"model": type(described.model).model_validate(keys)})
    resolved = resolve_model(described.model, examined.data.tokenizer.vocabulary, task=task_of(described.objective))
    return replace(examined.run, config=described, model=resolved)


@pytest.mark.parametrize("model", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=["1.0", "1.1"])
def test_meshes_equal_one_device(start, examined, model):
    wanted = losses_of(start, with_config(examined, ONE, **model), examined.data)
    assert len(set(wanted)) == 3
    for name in MESHES if not model else ("data2-fsdp2-tensor2",):
        found = losses_of(start, with_config(examined, on_mesh(name), **model), examined.data)
        assert found == pytest.approx(wanted, rel=1e-12), name


def test_dropout_is_the_same_on_every_mesh_and_changes_the_loss(start, examined):
    one = losses_of(start, with_config(examined, ONE, dropout_rate=0.2), examined.data)
    changes = on_mesh("data2-fsdp2-tensor2")
    changes["training"]["micro_batch"] = 2  # each micro-batch has draws of its own, and on one device there is one
    mesh = losses_of(start, with_config(examined, changes, dropout_rate=0.2), examined.data)
    assert mesh == pytest.approx(one, rel=1e-12)
    assert abs(one[0] - losses_of(start, with_config(examined, ONE), examined.data)[0]) > 1e-3


def test_every_kind_of_rematerialisation_computes_the_same(start, examined):
    wanted = losses_of(start, with_config(examined, ONE), examined.data)
    for remat in ("full", "dots", ["layer_input", "cross_attention_output"]):
        found = losses_of(start, with_config(examined, {**ONE, "jax": {"remat": remat}}), examined.data)
        assert found == pytest.approx(wanted, rel=1e-12), remat


def test_targets_on_a_mesh_are_those_of_one_device(start, examined):
    with BatchPipeline(examined.data, with_config(examined, ONE).config, "validation") as batches:
        batch = next(batches)
    found = []
    for changes in (ONE, on_mesh("data2-fsdp2-tensor2")):
        translator = start(with_config(examined, changes), training=False).translator(2, 4)
        logits = [translator.start(batch.source, batch.source_segments, 0)]
        parents = np.arange(2 * len(batch.source), dtype=np.int32) ^ 1  # beams change places
        logits += [translator.advance(np.full(parents.size, token, np.int32), parents) for token in (5, 7)]
        found.append(logits)
    for one, mesh in zip(*found, strict=True):
        np.testing.assert_allclose(mesh, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"data": 1, "context": 2}, "jax": {"cpu_devices": 8}}, "only causal-lm cuts sequences"),
        ({"jax": {"attention": "blocked"}}, "blocked cannot do an encoder-decoder's attention"),
        ({"parallel": {"data": 1, "tensor": 8}, "jax": {"cpu_devices": 8}}, "8 does not divide the number of attention heads"),
    ],
)
def test_what_an_encoder_decoder_cannot_do_is_refused(start, examined, changes, message):
    with pytest.raises(ConfigError, match=message):
        start(with_config(examined, {**ONE, **changes}))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", [RelativeSpec(32, 128), RelativeSpec(8, 20), RelativeSpec(4, 6), RelativeSpec(64, 1000)])
def test_buckets_are_those_of_transformers(causal, spec):
    distances = np.arange(-1100, 1101)

    def theirs() -> np.ndarray:
        found = T5Attention._relative_position_bucket(
            torch.from_numpy(distances), bidirectional=not causal, num_buckets=spec.buckets, max_distance=spec.max_distance
        )
        return found.numpy()

    assert np.array_equal(distance_buckets(distances, spec, causal=causal, dtype=np.float32), theirs())
    with true_float64():
        assert np.array_equal(distance_buckets(distances, spec, causal=causal, dtype=np.float64), theirs())
