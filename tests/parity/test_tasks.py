"""Every objective and head on both backends: one pass, one step, whole trajectories, a switch, and looking inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.backend import create_backend
from jaxllm.config.schema import BackendName, Precision
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.families import flatten
from jaxllm.families.rates import rate_scales
from jaxllm.parity import levels
from jaxllm.parity.find import find
from jaxllm.parity.subject import Subject, examine
from jaxllm.parity.tolerances import TOLERANCES, has_gradient, relative_error
from jaxllm.run import on_one_device
from jaxllm.schedule import hyper
from jaxllm.state import Progress, TrainingState
from jaxllm.state.initial import InitialWeights
from tests.parity.subjects import WELL_CONDITIONED
from tests.parity.tasks import CASES, MODELS, config, subject
from tests.tiny import TINY

pytest.importorskip("torch", reason="the other side of every comparison")

STEPS = 12
_T5 = ("t5", "t5-1.1")  # their initialiser has no such key
DAILY = {("bert", "masked-lm"), ("bert", "single"), ("roberta", "words"), ("t5", "seq2seq"), ("llama", "single")}
PASSES = {case for case in CASES if case[0] not in TINY} | {
    ("gpt2", "single"),
    ("gpt2", "words"),
    ("gemma2", "single"),
    ("mixtral", "single"),
}
"""One pass of each of these is compared every day, in fp64."""


def _nightly(family: str, objective: str, *rest: str, daily: bool = False) -> Any:
    """The case, left to the nightly run unless it is one of DAILY."""
    marks = () if daily or (family, objective) in DAILY else (pytest.mark.nightly,)
    return pytest.param(family, objective, *rest, marks=marks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.mark.parametrize(
    ("family", "objective", "precision"),
    [*(_nightly(*case, "fp64", daily=case in PASSES) for case in CASES), *(_nightly(*case, "fp32") for case in CASES)],
)
def test_one_pass_and_one_step_are_within_the_bounds(family: str, objective: str, precision: Precision, folder: Path) -> None:
    changes = {"model": {**MODELS[family], **WELL_CONDITIONED}} if precision == "fp32" and family not in _T5 else {}
    examined = subject(family, objective, folder, **changes)
    one_pass = levels.OnePass.of_run(examined.in_precision(precision), examined.data)
    first = next(iter(one_pass.inputs.values()))
    assert (first.segments == 0).any() == (objective != "masked-lm"), "examples are padded"
    assert 0 < first.target_tokens < first.weights.size or objective in ("single", "multi", "regression")
    if first.source_segments is not None:
        assert (first.source_segments == 0).any() or objective == "spans"
    for check in (*levels.forward(one_pass), *levels.backward(one_pass), *levels.optimizer(one_pass)):
        assert check.passed, (check.name, check.measured, check.bound)


@pytest.mark.parametrize(("family", "objective"), [_nightly(*case) for case in CASES])
def test_weights_and_moments_travel_bit_for_bit(family: str, objective: str, folder: Path) -> None:
    for check in levels.weights(subject(family, objective, folder).in_precision("fp32")):
        assert check.passed, check


def _train(name: BackendName, examined: Subject, state: TrainingState | None, stop: int) -> tuple[list[float], TrainingState]:
    run = on_one_device(examined.in_precision("fp64"))
    backend = create_backend(name)
    backend.start(run, state)
    try:
        start = state.progress.step if state else 0
        with BatchPipeline(examined.data, run.config, "train", backend.shard, start) as batches:
            steps = (hyper(step, step, STEPS, run.config) for step in range(start, stop))
            losses = [float(backend.step(next(batches), each).loss) for each in steps]
        exported = backend.export(Progress(stop, stop))
        parts = (exported.params, exported.exp_avg, exported.exp_avg_sq)
        return losses, TrainingState(Progress(stop, stop), *(levels.Held(part) for part in parts if part is not None))
    finally:
        backend.close()


@pytest.mark.parametrize(("family", "objective"), [_nightly(*case) for case in CASES])
def test_both_backends_train_alike_and_switch_in_the_middle(family: str, objective: str, folder: Path) -> None:
    examined = subject(family, objective, folder)
    bound = TOLERANCES["fp64"]
    losses, wanted = _train("jax", examined, None, STEPS)
    assert len(set(losses)) == STEPS
    torch_losses, found = _train("deepspeed", examined, None, STEPS)
    half, state = _train("deepspeed", examined, None, STEPS // 2)
    rest, switched = _train("jax", examined, state, STEPS)
    assert wanted.exp_avg_sq is not None
    sizes = {name: np.sqrt(wanted.exp_avg_sq.read(name)) for name in wanted.params.names()}
    largest = max(float(size.max()) for size in sizes.values())
    for each, of in ((torch_losses, found), (half + rest, switched)):
        assert relative_error(each, losses) <= bound.trajectory_loss
        for name in wanted.params.names():
            moved = has_gradient(sizes[name], largest)
            error = relative_error(of.params.read(name)[moved], wanted.params.read(name)[moved])
            assert error <= bound.trajectory_parameters, name


@pytest.mark.parametrize(("family", "objective"), sorted(DAILY))
def test_every_point_inside_agrees(family: str, objective: str, folder: Path) -> None:
    examined = subject(family, objective, folder)
    finding = find(examined.run, examined.data, "fp64")
    assert finding.agrees, (finding.first, finding.diagnosis)
    inside = {"layers.1.attention_residual_norm", "layers.1.mlp_residual"}
    decoder = {"layers.1.mlp_norm", "final_norm"}
    pair = {
        "encoder.embedding",
        "encoder.layers.1.query",
        "encoder.final_norm",
        "layers.2.cross_key",
        "layers.2.cross_attention_residual",
    }
    assert {"embedding", "logits", *{"t5": pair, "llama": decoder}.get(family, inside)} <= {step.name for step in finding.steps}


def test_frozen_and_slower_layers_are_the_same_on_both_backends(folder: Path) -> None:
    """Frozen weights stay, bit for bit, and take no part in the norm; rates fall towards the embeddings."""
    optimizer = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "layer_decay": 0.5,
        "frozen": ["bert.embeddings.*", "*layer.0.attention*"],
    }
    examined = examine(config("bert", "single", folder, optimizer=optimizer), folder)
    scales = rate_scales(examined.run.model, examined.run.config.optimizer)
    assert scales["classifier.weight"] == scales["bert.pooler.dense.bias"] == 1.0
    assert scales["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert scales["bert.encoder.layer.0.output.dense.weight"] == 0.25
    frozen = {name for name, scale in scales.items() if scale == 0.0}
    assert {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.key.bias"} <= frozen
    losses, wanted = _train("jax", examined, None, STEPS)
    torch_losses, found = _train("deepspeed", examined, None, STEPS)
    assert relative_error(torch_losses, losses) <= TOLERANCES["fp64"].trajectory_loss
    initial = InitialWeights(examined.run.model, examined.run.config.seed)
    idle = {name for name, rule, _ in flatten(examined.run.model.rules) if rule.idle}
    for name in scales:
        for side in (wanted, found):
            assert np.array_equal(side.params.read(name), initial.read(name)) == (name in frozen), name
        if name not in idle:
            error = relative_error(found.params.read(name), wanted.params.read(name))
            assert error <= TOLERANCES["fp64"].trajectory_parameters, name
