"""The loss in chunks of tokens: the same loss and gradients, no logits of all tokens, and what goes between devices."""

import jax
import numpy as np
import pytest

from jaxllm.jax_backend import JaxBackend
from jaxllm.jax_backend.optimizer import step_scalars
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from tests.unit.jax_backend import cases

CHUNK = 24  # of 512 tokens: 22 chunks, the last filled up
MODELS = {
    "untied": cases.LLAMA,
    "tied": cases.GPT2,
    "softcap": cases.FAMILIES["gemma2"],
    "experts": cases.FAMILIES["mixtral"],
}
MESHES = {
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context2-tensor2-fsdp2": {"data": 1, "context": 2, "tensor": 2, "fsdp": 2},
}


def started(model, chunk, **sections):
    precision = sections.pop("precision", "fp64")
    sections["training"] = {"precision": precision, "loss_chunk": chunk, **sections.pop("training", {})}
    run = cases.make_run(model, **sections)
    backend = JaxBackend()
    backend.start(run, None)
    return backend, run


def trajectory(model, chunk, **sections):
    backend, run = started(model, chunk, **sections)
    found = cases.take_steps(backend, run, range(3))
    evaluated = backend.evaluate([cases.make_batch(7)])
    backend.close()
    return found, evaluated.loss_sum


def assert_equal(found, wanted):
    bound = TOLERANCES["fp64"]
    assert found[0].losses == pytest.approx(wanted[0].losses, rel=bound.value)
    assert found[0].norms == pytest.approx(wanted[0].norms, rel=bound.value)
    assert found[1] == pytest.approx(wanted[1], rel=bound.value)
    for name, values in wanted[0].exp_avg.items():
        if not name.endswith(("attn.c_attn.bias", "key.bias")):  # a bias of keys has no gradient but rounding
            assert relative_error(found[0].exp_avg[name], values) <= bound.trajectory_parameters, name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_those_without_chunks(model):
    """Over three steps of two micro-batches each: Adam's first moment is a sum of their gradients."""
    micro = {"training": {"micro_batch": 8}}
    assert_equal(trajectory(model, CHUNK, **micro), trajectory(model, "none", **micro))


@pytest.mark.parametrize("chunk", [CHUNK, 4096], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("model", [cases.LLAMA, cases.GPT2], ids=["untied", "tied"])
def test_in_bfloat16_too(model, chunk):
    """Products of bfloat16 with sums in float32 are what XLA on a CPU has few kernels for."""
    found, exact = trajectory(model, chunk, precision="bf16")[0], trajectory(model, chunk)[0]
    # A number has 8 bits; losses are means of many, norms are of gradients that went through a few layers.
    assert found.losses == pytest.approx(exact.losses, rel=2**-9)
    assert found.norms == pytest.approx(exact.norms, rel=2**-6)


@pytest.mark.parametrize("parallel", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("vocabulary", [cases.VOCABULARY, cases.VOCABULARY + 1])
def test_on_a_mesh_they_are_those_of_one_device(parallel, vocabulary):
    """Also where the mesh does not divide the vocabulary."""
    model = {**cases.LLAMA, "vocab_size": vocabulary}
    found = trajectory(model, CHUNK, parallel=parallel, jax={"cpu_devices": 8})
    assert_equal(found, trajectory(model, "none"))


def test_masked_lm_has_a_bias():
    model = {"family": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 64, "vocab_size": cases.VOCABULARY, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    sections = {
        "objective": {"kind": "masked-lm"},
        "data": {"tokenizer": {"train": "wordpiece", "vocab_size": cases.VOCABULARY}},
    }
    chunked = trajectory(model, CHUNK, **sections, parallel={"fsdp": 2, "tensor": 2}, jax={"cpu_devices": 8})
    assert_equal(chunked, trajectory(model, "none", **sections))


def program(chunk, **sections):
    model = {**cases.LLAMA, "vocab_size": 8192}
    backend, run = started(model, chunk, precision="fp32", jax={"cpu_devices": 8}, **sections)
    inner = backend._started
    scalars = step_scalars(cases.hyper_of(0, run), run.config.optimizer, np.dtype(np.float32))
    batch = inner.feed(cases.make_batch())
    compiled = inner.train_step.lower(inner.params, inner.moments, batch, scalars, np.uint32(0)).compile()
    backend.close()
    return compiled


@pytest.mark.parametrize("parallel", [{}, {"fsdp": 2}], ids=["one", "fsdp2"])
def test_the_step_needs_less_than_the_logits(parallel):
    logits = 16 * 32 * 8192 * 4 / parallel.get("fsdp", 1)
    chunked, whole = (program(chunk, parallel=parallel).memory_analysis().temp_size_in_bytes for chunk in (CHUNK, "none"))
    assert whole > logits
    assert chunked < logits


def test_auto_leaves_small_vocabularies_alone():
    sizes = [program(chunk, parallel={}).memory_analysis().temp_size_in_bytes for chunk in ("auto", "none")]
    assert sizes[0] == sizes[1] > 16 * 32 * 8192 * 4


def test_logits_that_are_infinite_leave_the_weights_alone():
    backend, run = started(cases.LLAMA, CHUNK, precision="fp32")
    inner = backend._started
    inner.params["head.kernel"] = inner.params["head.kernel"].at[0, 0].set(np.inf)
    before = jax.device_get(inner.params)
    result = backend.step(cases.make_batch(), cases.hyper_of(0, run))
    assert not np.isfinite(float(result.loss))
    for path, values in jax.device_get(inner.params).items():
        np.testing.assert_array_equal(values, before[path])
    backend.close()
