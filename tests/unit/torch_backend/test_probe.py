"""The probe of the transformers model: what it captures, what it computes, what one step does.

Shape legend: B sequences, S tokens, H heads, K key/value heads, D head_dim, E hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jaxllm.backend import create_backend
from jaxllm.config.batch import resolve_batch
from jaxllm.data.batch import Batch
from jaxllm.families import flatten, module_points
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from jaxllm.probe import Pass, point_names
from jaxllm.run import Run
from jaxllm.state.initial import InitialWeights
from jaxllm.state.training_state import Progress, TensorReader, TrainingState
from jaxllm.torch_backend.engine import PlainEngine
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.group import alone
from jaxllm.torch_backend.mesh import single
from jaxllm.torch_backend.probe import TorchProbe
from jaxllm.torch_backend.step import Loop
from jaxllm.torch_backend.transfer import load_state
from tests.distributed.deepspeed_cases import Arrays, Reference, make_batch, make_hyper, make_run, random_state
from tests.unit.torch_backend.spy import Spy

ATTENTIONS = ["sdpa", "eager"]
FAMILIES = ["llama", "gpt2"]  # every family's points are checked by `parity --find`
EXACT = TOLERANCES["fp64"].value


def _params(run: Run) -> TensorReader:
    """Numbers such as no initialiser makes, so that biases and norms take part."""
    return random_state(run).params


def _probe(run: Run) -> TorchProbe:
    probe = TorchProbe()
    probe.load(run, _params(run))
    return probe


def _captured(family: str, attention: str = "sdpa") -> tuple[Run, Batch, Pass]:
    run, batch = make_run(family, precision="fp64", attention=attention), make_batch(0)
    return run, batch, _probe(run).passes(batch, capture=True)


def _close(value: Any, reference: Any, bound: float = EXACT) -> None:
    assert np.shape(value) == np.shape(reference)
    assert relative_error(value, reference) <= bound


# -------------------------------------------------------------------------------------------------------------- points


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_where_every_point_is(family: str) -> None:
    model = make_run(family).model
    assert {*module_points(model), "logits"} == set(point_names(model.spec))


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_is_captured_in_its_shape_and_in_forward_order(family: str, precision: str) -> None:
    run, batch = make_run(family, precision=precision), make_batch(0)
    spec, heads = run.model.spec, run.model.spec.attention
    found = _probe(run).passes(batch, capture=True)
    assert tuple(found.values) == point_names(spec)
    assert tuple(found.cotangents) == point_names(spec)
    last = {
        "query": (heads.heads, heads.head_dim),
        "key": (heads.kv_heads, heads.head_dim),
        "value": (heads.kv_heads, heads.head_dim),
        "logits": (spec.vocab_size,),
    }
    for point, value in found.values.items():
        shape = (batch.rows, batch.sequence_length, *last.get(point.rpartition(".")[2], (spec.hidden_size,)))
        assert value.shape == found.cotangents[point].shape == shape
        assert value.dtype == found.cotangents[point].dtype == (np.float64 if precision == "fp64" else np.float32)
        assert np.abs(value).max() > 0
        assert np.abs(found.cotangents[point]).max() > 0
    np.testing.assert_array_equal(found.values["logits"], found.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_follow_from_one_another(family: str) -> None:
    run, _, found = _captured(family)
    values = found.values
    stream = values["embedding"]
    for layer in range(run.model.spec.layers):
        at = f"layers.{layer}."
        _close(values[at + "attention_residual"], stream + values[at + "attention_output"])
        _close(values[at + "residual"], values[at + "attention_residual"] + values[at + "mlp_output"])
        stream = values[at + "residual"]


def _of_layer(run: Run, layer: int, path: str) -> NDArray[Any]:
    """A weight of one layer in float64, as (heads, head_dim, embed) or (embed): by the path that every family has."""
    name, rule = next((n, rule) for n, rule, at in flatten(run.model.rules) if at == layer and rule.paths == (path,))
    (values,) = rule.to_flax(_params(run).read(name))
    return values.astype(np.float64)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_and_value_are_what_attention_reads(family: str, attention: str) -> None:
    """Attention by hand over the captured tensors gives the captured output, so that they are position-encoded already."""
    run, batch, found = _captured(family, attention)
    heads = run.model.spec.attention
    allowed_BQK = np.tril(batch.segments[:, :, None] == batch.segments[:, None, :])
    for layer in range(run.model.spec.layers):
        query, key, value = (found.values[f"layers.{layer}.{point}"] for point in ("query", "key", "value"))
        key, value = (np.repeat(array, heads.heads // heads.kv_heads, axis=2) for array in (key, value))
        scores_BHQK = np.where(allowed_BQK[:, None], np.einsum("bqhd,bkhd->bhqk", query, key) * heads.scale, -np.inf)
        weights_BHQK = np.exp(scores_BHQK - scores_BHQK.max(-1, keepdims=True))
        weights_BHQK /= weights_BHQK.sum(-1, keepdims=True)
        mixed_BSHD = np.einsum("bhqk,bkhd->bqhd", weights_BHQK, value)
        kernel_HDE, bias_E = (_of_layer(run, layer, f"layers.attention.output.{part}") for part in ("kernel", "bias"))
        expected_BSE = np.einsum("bshd,hde->bse", mixed_BSHD, kernel_HDE) + bias_E
        _close(found.values[f"layers.{layer}.attention_output"], expected_BSE)


# ---------------------------------------------------------------------------------------------------------- cotangents


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cotangent_of_the_logits_is_the_analytic_one(family: str, attention: str) -> None:
    _, batch, found = _captured(family, attention)
    shifted = np.exp(found.logits - found.logits.max(-1, keepdims=True))
    expected = shifted / shifted.sum(-1, keepdims=True)
    np.put_along_axis(expected, batch.targets[..., None], np.take_along_axis(expected, batch.targets[..., None], -1) - 1.0, -1)
    _close(found.cotangents["logits"], expected * batch.weights[..., None] / batch.target_tokens)


def _summed(cotangent: NDArray[Any]) -> NDArray[Any]:
    """Over sequences and tokens: the gradient of a bias that was added there."""
    total: NDArray[Any] = cotangent.sum((0, 1))
    return total.reshape(-1)


def test_cotangents_of_gpt2_add_up_to_the_gradients_of_its_biases() -> None:
    run, batch, found = _captured("gpt2")
    cotangents, gradients = found.cotangents, found.gradients
    stream = cotangents["embedding"]
    positions = np.zeros((run.model.spec.max_positions, run.model.spec.hidden_size))
    np.add.at(positions, batch.positions, stream)
    _close(gradients["transformer.wpe.weight"], positions)
    for layer in range(run.model.spec.layers):
        at, of = f"layers.{layer}.", f"transformer.h.{layer}."
        heads = [_summed(cotangents[at + point]) for point in ("query", "key", "value")]
        _close(gradients[of + "attn.c_attn.bias"], np.concatenate(heads))
        for point, name in (
            ("attention_norm", "ln_1"),
            ("attention_output", "attn.c_proj"),
            ("mlp_norm", "ln_2"),
            ("mlp_output", "mlp.c_proj"),
        ):
            _close(gradients[f"{of}{name}.bias"], _summed(cotangents[at + point]))
        np.testing.assert_array_equal(cotangents[at + "attention_output"], cotangents[at + "attention_residual"])
        np.testing.assert_array_equal(cotangents[at + "mlp_output"], cotangents[at + "residual"])
    _close(gradients["transformer.ln_f.bias"], _summed(cotangents["final_norm"]))


def test_cotangents_of_llama_add_up_to_its_gradients() -> None:
    run, batch, found = _captured("llama")
    cotangents, gradients = found.cotangents, found.gradients
    embedding = np.zeros_like(gradients["model.embed_tokens.weight"])
    np.add.at(embedding, batch.inputs, cotangents["embedding"])
    _close(gradients["model.embed_tokens.weight"], embedding)
    _close(gradients["lm_head.weight"], np.einsum("bsv,bse->ve", cotangents["logits"], found.values["final_norm"]))
    for layer in range(run.model.spec.layers):
        of = f"model.layers.{layer}.self_attn."
        _close(gradients[of + "v_proj.bias"], _summed(cotangents[f"layers.{layer}.value"]))
        _close(gradients[of + "o_proj.bias"], _summed(cotangents[f"layers.{layer}.attention_output"]))


# -------------------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_plain_calls(family: str, precision: str) -> None:
    """The reference runs every document alone through the stock model and differentiates the mean over target tokens."""
    run, batch = make_run(family, precision=precision), make_batch(0)
    found = _probe(run).passes(batch)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    if precision == "fp64":
        with true_float64():
            reference = Reference(run, _params(run), dtype)
            loss = reference.loss_sum(batch) / batch.target_tokens
            loss.backward()  # type: ignore[no-untyped-call]
    else:
        reference = Reference(run, _params(run), dtype)
        loss = reference.loss_sum(batch) / batch.target_tokens
        loss.backward()  # type: ignore[no-untyped-call]
    bound = TOLERANCES[precision].value  # type: ignore[index]
    _close(found.loss, float(loss.detach()), bound)
    assert found.gradients.keys() == reference.named.keys()
    for name, parameter in reference.named.items():
        _close(found.gradients[name], parameter.grad, bound)
    assert not found.values
    assert not found.cotangents


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_changes_no_bit(family: str, precision: str, attention: str) -> None:
    probe = _probe(make_run(family, precision=precision, attention=attention))
    batch = make_batch(0).select(2, 4)  # one micro-batch with and without capture
    plain, captured, again = probe.passes(batch), probe.passes(batch, capture=True), probe.passes(batch)
    for other in (captured, again):
        assert other.loss == plain.loss
        np.testing.assert_array_equal(other.logits, plain.logits)
        for name, gradient in plain.gradients.items():
            np.testing.assert_array_equal(other.gradients[name], gradient)


def test_micro_batches_weigh_every_token_alike() -> None:
    batch = make_batch(0)
    in_parts = _probe(make_run(precision="fp64")).passes(batch)
    whole = _probe(make_run(precision="fp64")).passes(batch, capture=True)
    _close(in_parts.loss, whole.loss)
    _close(in_parts.logits, whole.logits)
    for name, gradient in whole.gradients.items():
        _close(in_parts.gradients[name], gradient)


def test_bf16_gradients_are_summed_up_in_float32() -> None:
    """Every part is a bf16 number; their sum, kept in bf16, would be one again."""
    batch = make_batch(0)
    # As many target tokens in each of the 4 parts, so that their means are those of the whole times 4, without rounding.
    batch = replace(batch, weights=(batch.segments > 0).astype(np.float32))
    probe = _probe(make_run(precision="bf16"))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = np.zeros((), np.float32)
    for start in range(0, batch.rows, 2):
        gradient = probe.passes(batch.select(start, start + 2)).gradients[name]
        assert _is_bf16(gradient)
        expected = expected + gradient / np.float32(4)
    found = probe.passes(batch).gradients[name]
    assert not _is_bf16(found)
    np.testing.assert_array_equal(found, expected)


def _is_bf16(values: NDArray[Any]) -> bool:
    return bool((torch.from_numpy(values).bfloat16().float().numpy() == values).all())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_holds_no_lower_precision(family: str, attention: str) -> None:
    probe, batch = _probe(make_run(family, precision="fp64", attention=attention)), make_batch(0)
    with Spy() as spy:
        probe.passes(batch, capture=True)
        probe.after_step(batch, make_hyper(0))
    assert spy.seen > 200
    assert not spy.lower


def test_dropout_is_off() -> None:
    batch = make_batch(0)
    dry, dropping = (
        make_run("gpt2", model=dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)) for rate in (0.0, 0.5)
    )
    first, second = _probe(dry), _probe(dropping)
    np.testing.assert_array_equal(second.passes(batch).logits, first.passes(batch).logits)
    stepped = first.after_step(batch, make_hyper(0))
    for name, values in second.after_step(batch, make_hyper(0)).items():
        np.testing.assert_array_equal(values, stepped[name])


# ---------------------------------------------------------------------------------------------------------- one update


@pytest.mark.parametrize("clip_norm", [None, 1e-2, 1e3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_hand_written_one(family: str, clip_norm: float | None) -> None:
    run, batch, hyper = make_run(family, precision="fp64", clip_norm=clip_norm), make_batch(0), make_hyper(0)
    stepped = _probe(run).after_step(batch, hyper)
    with true_float64():
        reference = Reference(run, _params(run), torch.float64)
        _, norm = reference.step(batch, hyper.learning_rate)
    assert 1e-2 < norm < 1e3  # so that one of them clips and the other does not
    assert stepped.keys() == reference.named.keys()
    for name, values in reference.weights().items():
        assert np.abs(values - _params(run).read(name)).max() > 1e-3 * hyper.learning_rate
        _close(stepped[name], values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_bit_for_bit_that_of_the_deepspeed_backend(family: str, precision: str) -> None:
    run, batch, hyper = make_run(family, precision=precision, zero_stage=0), make_batch(0), make_hyper(0)
    probe = TorchProbe()
    probe.load(run, InitialWeights(run.model, run.config.seed))
    stepped = probe.after_step(batch, hyper)
    backend = create_backend("deepspeed")
    backend.start(run, None)
    result = backend.step(batch, hyper)
    trained = backend.export(Progress(step=1, updates=1)).params
    assert float(result.loss) == probe.passes(batch).loss
    assert list(stepped) == list(trained.names())
    for name, values in stepped.items():
        np.testing.assert_array_equal(values, trained.read(name))
    backend.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plain_engine_trains_as_deepspeed_does(precision: str) -> None:
    """Over several steps, in which a bf16 model has to follow its masters."""
    run, group = make_run(precision=precision), single(alone())
    engine = PlainEngine(run, group, training=True)
    load_state(engine.store, TrainingState(Progress(), InitialWeights(run.model, run.config.seed)))
    loop = Loop(engine, group, resolve_batch(run.config, 1), "sdpa", run.config.seed, run.model.spec)
    backend = create_backend("deepspeed")
    backend.start(run, None)
    for step in range(3):
        plain = loop.step(make_batch(step), make_hyper(step), step)
        deepspeed = backend.step(make_batch(step), make_hyper(step))
        assert float(plain.loss) == float(deepspeed.loss)
        assert float(plain.gradient_norm) == float(deepspeed.gradient_norm)
    backend.close()


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_step_leaves_the_loaded_weights(precision: str) -> None:
    probe, batch = _probe(make_run(precision=precision)), make_batch(0)
    before = probe.passes(batch)
    first, second = (probe.after_step(batch, make_hyper(0)) for _ in range(2))
    after = probe.passes(batch)
    np.testing.assert_array_equal(after.logits, before.logits)
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)  # moments were zero again
        np.testing.assert_array_equal(after.gradients[name], before.gradients[name])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    run = make_run()
    params = {name: _params(run).read(name).copy() for name in _params(run).names()}
    params["model.norm.weight"][0] = np.nan
    probe = TorchProbe()
    probe.load(run, Arrays(params))
    for name, values in probe.after_step(make_batch(0), make_hyper(0)).items():
        np.testing.assert_array_equal(values, params[name])
