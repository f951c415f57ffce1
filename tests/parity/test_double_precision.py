"""fp64 is float64 throughout, in every family and head: no operation of either backend yields fewer bits."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.config.schema import Precision
from jaxllm.data.batch import Batch
from jaxllm.jax_backend.optimizer import step_scalars
from jaxllm.jax_backend.probe import JaxProbe
from jaxllm.parity.levels import OnePass, first_step
from jaxllm.run import Run
from jaxllm.state.initial import InitialWeights
from tests.jaxprs import floating_results
from tests.parity import tasks
from tests.parity.subjects import MODELS, subject

pytest.importorskip("torch", reason="the other side")

# Every head, and every kind of loss.
HEADS = (
    ("bert", "masked-lm"),
    ("bert", "single"),
    ("bert", "multi"),
    ("roberta", "regression"),
    ("roberta", "words"),
    ("t5", "seq2seq"),
    ("t5-1.1", "spans"),
)
SUBJECTS = [*((family, "causal-lm") for family in MODELS), *HEADS]
# The loss weights of a batch, and targets that are numbers, are float32: all that happens to them before they widen.
MOVED = {"slice", "squeeze", "reshape", "scan", "jit", "pjit", "copy", "dynamic_slice", "gather"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("double")


def _first(family: str, objective: str, folder: Path, precision: Precision = "fp64") -> tuple[Run, Batch]:
    """A run of one device, and the first input that parity compares."""
    examined = subject(family, folder) if objective == "causal-lm" else tasks.subject(family, objective, folder)
    one_pass = OnePass.of_run(examined.in_precision(precision), examined.data)
    return one_pass.run, next(iter(one_pass.inputs.values()))


def _narrower(run: Run, batch: Batch) -> set[tuple[str, str]]:
    """What JAX's training step computes in less than float64."""
    probe = JaxProbe()
    probe.load(run, InitialWeights(run.model, run.config.seed))
    loaded = probe._loaded
    master = loaded.network.runtime.policy.master
    scalars = step_scalars(first_step(run.config), run.config.optimizer, master)
    moments = jax.eval_shape(loaded.zero_moments, loaded.params)
    placed = probe._place(batch, run.config.training.micro_batch)
    traced = loaded.train_step.trace(loaded.params, moments, placed, scalars, np.uint32(0))
    found = floating_results(traced.jaxpr.jaxpr)
    assert ("dot_general", str(master)) in found
    return {(name, dtype) for name, dtype in found if dtype != "float64" and name not in MOVED}


@pytest.mark.parametrize(("family", "objective"), SUBJECTS)
def test_nothing_in_the_step_of_jax_is_narrower(family: str, objective: str, folder: Path) -> None:
    assert _narrower(*_first(family, objective, folder)) == set()


def test_a_step_in_fp32_is_seen_to_be_narrower(folder: Path) -> None:
    found = _narrower(*_first("mixtral", "causal-lm", folder, "fp32"))
    assert {("dot_general", "float32"), ("rsqrt", "float32"), ("exp", "float32")} <= found


@pytest.mark.parametrize(("family", "objective"), SUBJECTS)
def test_nothing_in_the_transformers_model_is_narrower(family: str, objective: str, folder: Path) -> None:
    from jaxllm.torch_backend.probe import TorchProbe
    from tests.unit.torch_backend.spy import Spy

    run, batch = _first(family, objective, folder)
    probe = TorchProbe()
    probe.load(run, InitialWeights(run.model, run.config.seed))
    with Spy() as spy:
        probe.passes(batch, capture=True)
        probe.after_step(batch, first_step(run.config))
    assert spy.seen > 200
    assert not spy.lower
