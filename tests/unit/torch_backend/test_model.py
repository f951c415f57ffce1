"""The Hugging Face model behind the backend: masks, packing, parameters, and the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jaxllm.errors import BackendError
from jaxllm.run import Run
from jaxllm.state.initial import InitialWeights
from jaxllm.state.training_state import Progress, TrainingState
from jaxllm.torch_backend.engine import PlainEngine, forward
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.group import join
from jaxllm.torch_backend.loss import weighted_loss
from jaxllm.torch_backend.mesh import single
from jaxllm.torch_backend.model import build_model, model_inputs, packed_mask
from jaxllm.torch_backend.transfer import load_state
from tests.distributed.deepspeed_cases import MODELS, make_batch, make_run
from tests.unit.torch_backend.spy import Spy

ATTENTIONS = ["sdpa", "eager"]
# sdpa cannot cap scores, and is refused with a model that does.
CASES = [
    (family, attention)
    for family, keys in MODELS.items()
    for attention in ATTENTIONS
    if not (attention == "sdpa" and keys.get("attn_logit_softcapping"))
]
CPU = torch.device("cpu")


def _engine(run: Run, training: bool = True) -> PlainEngine:
    engine = PlainEngine(run, single(join()), training)
    load_state(engine.store, TrainingState(Progress(), InitialWeights(run.model, run.config.seed)))
    return engine


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_the_float64_reference_has_no_lower_operation(family: str, attention: str) -> None:
    run = make_run(family, precision="fp64", attention=attention)
    engine = _engine(run)
    inputs = model_inputs(make_batch(0), run.model.spec, attention, torch.float64, CPU)  # type: ignore[arg-type]
    with Spy() as spy:
        with engine.numerics():
            loss = weighted_loss("cross-entropy", forward(engine, inputs), inputs.targets, inputs.weights)
        engine.backward(loss)
        engine.update(1e-3)
    assert spy.seen > 100
    assert not spy.lower


def test_the_spy_sees_what_a_plain_double_model_does_in_float32() -> None:
    """Otherwise the test above could not fail."""
    run = make_run("llama")
    model = build_model(run.model, "sdpa", torch.float64, CPU)
    inputs = model_inputs(make_batch(0), run.model.spec, "sdpa", torch.float64, CPU)
    with Spy() as spy, torch.no_grad():
        model(**inputs.arguments)
    assert spy.lower


def test_true_float64_ends_with_its_context() -> None:
    with true_float64():
        assert torch.zeros(1).dtype == torch.float64
        assert torch.zeros(1, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(1).float().dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_mask_is_causal_within_a_segment(attention: str) -> None:
    segments = torch.tensor([[1, 1, 2, 2, 0, 0]])
    mask = packed_mask(segments, attention, torch.float32)  # type: ignore[arg-type]
    allowed = mask if attention == "sdpa" else mask == 0
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert allowed[0, 0].int().tolist() == expected


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_packed_document_is_computed_as_if_it_were_alone(family: str, attention: str) -> None:
    run = make_run(family, precision="fp64", attention=attention)
    engine = _engine(run)
    batch = make_batch(0).select(3, 4)
    with engine.numerics(), torch.no_grad():
        inputs = model_inputs(batch, run.model.spec, attention, torch.float64, CPU)  # type: ignore[arg-type]
        packed = forward(engine, inputs)[0]
        assert torch.isfinite(packed).all()  # padding included
        for segment in sorted(set(batch.segments[0].tolist()) - {0}):
            where = torch.from_numpy(np.flatnonzero(batch.segments[0] == segment))
            alone = engine.model(input_ids=torch.from_numpy(batch.inputs[:, where]).long(), use_cache=False).logits[0]
            torch.testing.assert_close(packed[where], alone, rtol=1e-12, atol=1e-14)


def test_bf16_logits_are_summed_up_in_float32() -> None:
    logits = torch.randn(2, 3, 11, dtype=torch.bfloat16)
    targets, weights = torch.randint(0, 11, (2, 3)), torch.rand(2, 3)
    loss = weighted_loss("cross-entropy", logits, targets, weights)
    assert loss.dtype == torch.float32
    log_probabilities = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert float(loss) == pytest.approx(-float((log_probabilities * weights).sum()), rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(MODELS))
def test_transformers_has_the_parameters_of_the_table(family: str, tied: bool) -> None:
    model = build_model(make_run(family, model={"tie_word_embeddings": tied}).model, "eager", torch.float32, CPU)
    names = dict(model.named_parameters())
    assert ("lm_head.weight" in names) is not tied
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_table_that_differs_from_transformers_is_refused_by_name() -> None:
    model = make_run("llama").model
    rules = tuple(rule for rule in model.rules if rule.name != "model.norm.weight")
    shrunk = tuple(replace(rule, pattern="embed -> embed") if rule.name == "lm_head.weight" else rule for rule in rules)
    with pytest.raises(BackendError) as refused:
        build_model(replace(model, rules=shrunk), "sdpa", torch.float32, CPU)
    assert "model.norm.weight is not in the table" in str(refused.value)
    assert "lm_head.weight has shape [61, 20] instead of [20]" in str(refused.value)


def test_rotary_frequencies_stay_exact_in_bf16() -> None:
    bf16, fp32 = (
        dict(build_model(make_run("llama").model, "sdpa", dtype, CPU).named_buffers())
        for dtype in (torch.bfloat16, torch.float32)
    )
    frequencies = [name for name in fp32 if name.endswith("inv_freq")]
    assert frequencies
    for name in frequencies:
        assert bf16[name].dtype == torch.float32
        torch.testing.assert_close(bf16[name], fp32[name], rtol=0, atol=0)
