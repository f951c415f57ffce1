"""DeepSpeed on every mesh, in 2 and 4 real processes over gloo: AutoTP, Ulysses, ZeRO shards and offload train as one process.

Every layout is held against the hand-written training of one process and against JAX on one device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from jaxllm.backend import create_backend
from jaxllm.errors import ConfigError
from jaxllm.parity.tolerances import TOLERANCES
from jaxllm.state.initial import InitialWeights
from jaxllm.state.training_state import Progress
from jaxllm.torch_backend.combinations import AUTOTP_FAMILIES, check_combinations
from jaxllm.torch_backend.float64 import true_float64
from tests.distributed.deepspeed_cases import (
    MeshCase,
    Reference,
    make_batch,
    make_hyper,
    make_run,
    materialise,
    mesh_cases,
    random_state,
)
from tests.distributed.test_deepspeed_engine import Found, _distance, _run_workers, _tensors
from tests.tiny import TINY

WORLDS = (2, 4)
CASES = [case for world in WORLDS for case in mesh_cases(world)]
_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
# bf16 rounds to 8 bits; these bounds only find runs that compute something else.
_BF16 = 0.02

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.world}-{case.key}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """Findings by world size."""
    script = "deepspeed_mesh_worker.py"
    return {world: _run_workers(world, tmp_path_factory.mktemp(f"mesh{world}"), script) for world in WORLDS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _bound(case: MeshCase) -> float:
    return TOLERANCES[case.run.config.training.precision].value if case.precision != "bf16" else _BF16


@cache
def _reference(family: str, dtype: torch.dtype) -> tuple[list[tuple[float, float]], dict[str, Any], float]:
    """Losses and norms of the hand-written training, the weights it ends with, and the loss of an evaluation before it."""
    run = make_run(family)
    with _numerics(dtype):
        reference = Reference(run, InitialWeights(run.model, run.config.seed), dtype)
        with torch.no_grad():
            evaluated = float(reference.loss_sum(make_batch(100)))
        made = [reference.step(make_batch(step), make_hyper(step).learning_rate) for step in range(4)]
    return made, reference.weights(), evaluated


def _numerics(dtype: torch.dtype) -> AbstractContextManager[None]:
    """What keeps stock modelling code from dropping to float32 inside a float64 model."""
    return true_float64() if dtype == torch.float64 else nullcontext()


@cache
def _jax(family: str, precision: str) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Losses, norms and final weights of JAX on one device."""
    backend = create_backend("jax")
    backend.start(make_run(family, precision=precision, parallel={"data": 1}), None)
    results = [backend.step(make_batch(step), make_hyper(step)) for step in range(4)]
    made = [(float(result.loss), float(result.gradient_norm)) for result in results]
    weights = materialise(backend.export(Progress(4, 4)).params)
    backend.close()
    return made, weights


@every_case
def test_it_trains_as_one_process_does(found: dict[int, Found], case: MeshCase) -> None:
    results, arrays = found[case.world]
    expected, weights, evaluated = _reference(case.family, _DTYPES[case.precision])
    bound = _bound(case)
    for (loss, norm, tokens), (wanted_loss, wanted_norm), step in zip(
        results[f"steps/{case.key}"], expected, range(4), strict=True
    ):
        assert loss == pytest.approx(wanted_loss, rel=bound)
        assert norm == pytest.approx(wanted_norm, rel=bound)
        assert tokens == make_batch(step).target_tokens
    assert _distance(_tensors(arrays, f"final/{case.key}"), weights) < bound
    assert results[f"evaluation/{case.key}"] == [pytest.approx(evaluated, rel=bound), make_batch(100).target_tokens]


@pytest.mark.parametrize("case", [case for case in CASES if case.precision != "bf16"], ids=lambda c: f"{c.world}-{c.key}")
def test_it_trains_as_jax_does(found: dict[int, Found], case: MeshCase) -> None:
    results, arrays = found[case.world]
    expected, weights = _jax(case.family, case.precision)
    for (loss, norm, _), (wanted_loss, wanted_norm) in zip(results[f"steps/{case.key}"], expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=_bound(case))
        assert norm == pytest.approx(wanted_norm, rel=_bound(case))
    assert _distance(_tensors(arrays, f"final/{case.key}"), weights) < _bound(case)


@every_case
def test_a_state_from_elsewhere_arrives_bit_for_bit(found: dict[int, Found], case: MeshCase) -> None:
    """Weights and both moments, cut over processes and put together again: so any layout resumes from any other."""
    state = random_state(case.run)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        arrived = _tensors(found[case.world][1], f"restored/{case.key}", kind)
        expected = materialise(getattr(state, kind))
        assert arrived.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(arrived[name], expected[name], err_msg=f"{kind} {name}")


@every_case
def test_a_state_from_elsewhere_goes_on(found: dict[int, Found], case: MeshCase) -> None:
    expected = _continued(case.family, _DTYPES[case.precision])
    for (loss, norm, _), (wanted_loss, wanted_norm) in zip(
        found[case.world][0][f"continued/{case.key}"], expected, strict=True
    ):
        assert loss == pytest.approx(wanted_loss, rel=_bound(case))
        assert norm == pytest.approx(wanted_norm, rel=_bound(case))


@cache
def _continued(family: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    run = make_run(family)
    state = random_state(run)
    with _numerics(dtype):
        reference = Reference(run, state.params, dtype)
        reference.load_moments(state)
        return [reference.step(make_batch(step), make_hyper(step).learning_rate) for step in range(9, 11)]


def _with(found: dict[int, Found], prefix: str) -> list[str]:
    keys = [key.removeprefix(prefix) for key in found[2][0] if key.startswith(prefix)]
    assert keys
    return keys


def test_a_step_that_is_not_finite_leaves_the_state_alone(found: dict[int, Found]) -> None:
    """On one shard of the tensors, or for one part of the tokens alone, yet all processes leave the update out."""
    results, arrays = found[2]
    for key in _with(found, "nan_loss/"):
        assert not np.isfinite(results[f"nan_loss/{key}"]).any()
        loss, norm = results[f"infinite_gradient/{key}"]
        assert np.isfinite(loss)
        assert not np.isfinite(norm)
        for kind in ("params", "exp_avg", "exp_avg_sq"):
            before, after = (_tensors(arrays, f"{when}_fault/{key}", kind) for when in ("before", "after"))
            assert len(before) == len(after) > 0
            for name in before:
                np.testing.assert_array_equal(after[name], before[name], err_msg=f"{key} {kind} {name}")


def test_decoding_gives_the_logits_of_the_whole_sequence(found: dict[int, Found]) -> None:
    results, arrays = found[2]
    run = make_run("llama-heads")
    reference = Reference(run, InitialWeights(run.model, run.config.seed), torch.float32)
    with torch.no_grad():
        expected = reference.model(input_ids=torch.tensor([[5, 17, 3, 44, 8, 29, 60]]), use_cache=False).logits[0, 2:].numpy()
    for key in _with(found, "after_decoding/"):
        np.testing.assert_allclose(arrays[f"logits/{key}"], expected, rtol=1e-5, atol=1e-6, err_msg=key)
        loss, norm, _ = results[f"after_decoding/{key}"][0]
        assert (loss, norm) == pytest.approx(_reference("llama-heads", torch.float32)[0][0], rel=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_every_family_trains_on_divided_sequences_and_tensors(found: dict[int, Found], family: str) -> None:
    """Against two processes with rows of their own, in float64; a family that is not split is refused by name."""
    results, arrays = found[2]
    if family not in AUTOTP_FAMILIES:
        with pytest.raises(ConfigError, match="a family that AutoTP does not split"):
            check_combinations((run := make_run(f"tiny-{family}", parallel={"tensor": 2})).config, run.model, 2)
    for axis in ("context", *(["tensor"] if family in AUTOTP_FAMILIES else [])):
        for found_step, expected in zip(results[f"family/{family}/{axis}"], results[f"family/{family}/data"], strict=True):
            assert found_step == pytest.approx(expected, rel=TOLERANCES["fp64"].value)
        weights, expected_weights = (_tensors(arrays, f"family/{family}/{key}") for key in (axis, "data"))
        assert _distance(weights, expected_weights) < TOLERANCES["fp64"].trajectory_parameters


def test_a_classifier_trains_on_divided_tensors(found: dict[int, Found]) -> None:
    results, arrays = found[2]
    for step, expected in zip(results["classifier/tensor"], results["classifier/data"], strict=True):
        assert step == pytest.approx(expected, rel=TOLERANCES["fp64"].value)
    weights, expected_weights = (_tensors(arrays, f"classifier/{axis}") for axis in ("tensor", "data"))
    assert "score.weight" in weights
    assert _distance(weights, expected_weights) < TOLERANCES["fp64"].trajectory_parameters


def test_memory_is_that_of_the_run(found: dict[int, Found]) -> None:
    """A model of a few kilobytes adds little to a process of several hundred megabytes."""
    for world in WORLDS:
        for case in mesh_cases(world):
            assert 0 <= found[world][0][f"memory/{case.key}"] < 150 * 2**20
