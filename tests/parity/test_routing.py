"""Tokens that the backends send to different experts: ties are told from mistakes, and what remains is compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxllm.backend import create_probe
from jaxllm.config.schema import BackendName
from jaxllm.data.batch import Batch
from jaxllm.parity import find as find_module
from jaxllm.parity import levels
from jaxllm.parity.levels import Held, OnePass
from jaxllm.parity.routing import decisions
from jaxllm.probe import Choices, Probe
from jaxllm.state.initial import InitialWeights
from tests.parity.subjects import WELL_CONDITIONED, subject
from tests.parity.test_find import Faulty

ROUTER = "model.layers.{layer}.mlp.gate.weight"


def _batch() -> Batch:
    ones = np.ones((1, 3), np.int32)
    return Batch(ones, ones, ones.astype(np.float32), ones, np.array([[1, 1, 0]], np.int32))


def _choices(logits: list[list[float]], chosen: list[list[int]]) -> dict[str, Choices]:
    return {"layers.0.router": Choices(np.array([logits]), np.array([chosen]))}


def test_a_gap_is_the_error_of_logits_that_explains_a_choice() -> None:
    logits = [[4.0, 1.0, 1.002, 0.0], [0.0, 2.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]]
    theirs = _choices(logits, [[0, 2], [2, 1], [0, 1]])
    same = decisions(_batch(), _choices(logits, [[2, 0], [1, 2], [3, 2]]), theirs)
    assert (same.total, same.different, same.gap) == (2, 0, 0.0), "neither order nor padding counts"
    other = decisions(_batch(), _choices(logits, [[0, 1], [2, 1], [0, 1]]), theirs)
    assert (other.total, other.different) == (2, 1)
    assert other.gap == pytest.approx(0.002 / 2 / 4.0)
    assert str(other) == "1 of 2 choices differ"


def _one_pass(monkeypatch: pytest.MonkeyPatch, cache: Path, tie: float, fault: float) -> OnePass:
    """Experts 2 and 5 have router weights that differ by `tie`; JAX has them exchanged, and one of them wrong by `fault`."""
    examined = subject("mixtral", cache, **WELL_CONDITIONED)
    run = examined.in_precision("fp32")
    weights = Held(InitialWeights(run.model, run.config.seed))
    twins = {ROUTER.format(layer=layer): weights.tensors[ROUTER.format(layer=layer)] for layer in range(2)}
    for router in twins.values():
        router[5] = router[2] * np.float32(1.0 + tie)

    def turned(held: Held) -> Held:
        for name in twins:
            router = held.tensors[name] = held.tensors[name].copy()
            router[[2, 5]] = router[[5, 2]]
            router[5] += np.float32(fault) * router[1]
        return held

    def create(name: BackendName) -> Probe:
        return Faulty(weights=turned) if name == "jax" else create_probe(name)  # type: ignore[return-value]

    monkeypatch.setattr(levels, "create_probe", create)
    one_pass = OnePass.of_run(run, examined.data)
    one_pass.params = weights
    return one_pass


def test_ties_are_counted_and_everything_else_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_pass = _one_pass(monkeypatch, tmp_path, tie=2e-6, fault=0.0)
    checks = [*levels.forward(one_pass), *levels.backward(one_pass)]
    assert [check for check in checks if not check.passed] == []
    routers = [check for check in checks if check.name.startswith("experts that routers choose")]
    assert len(routers) == 4
    for check in routers:
        assert 0 < check.detail["different"] < check.detail["choices"]
        assert f"{check.detail['different']} of {check.detail['choices']} choices differ" in check.name
        assert 0.0 < check.measured < 5e-6


def test_a_router_that_is_wrong_is_no_tie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_pass = _one_pass(monkeypatch, tmp_path, tie=0.3, fault=0.1)
    failed = {check.name.partition(",")[0] for check in levels.forward(one_pass) if not check.passed}
    assert {"experts that routers choose", "logits", "loss"} <= failed


def test_find_says_that_a_choice_was_a_tie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_pass = _one_pass(monkeypatch, tmp_path, tie=2e-6, fault=0.0)
    monkeypatch.setattr(find_module, "initial_weights", lambda *_: one_pass.params)
    probes = levels.create_probe("jax"), create_probe("deepspeed")
    finding = find_module.find(one_pass.run, subject("mixtral", tmp_path, **WELL_CONDITIONED).data, "fp32", probes)
    assert finding.first is not None
    assert finding.first.name == "layers.0.mlp_output"
    assert "choices differ: ties that rounding breaks" in finding.diagnosis
