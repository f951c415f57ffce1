"""Levels 5 and 6 for every family with a head of labels: training, ZeRO stages, and a switch in the middle.

One pass, one step and whole runs on real examples are in test_tasks.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.config.schema import Precision
from jaxllm.state import read_state
from tests.parity.conftest import Run, Zero, run_zero
from tests.parity.test_trajectory import STAGES, assert_same
from tests.parity.trajectories import CLASSIFIERS, MESHES, ONE, make_run, train

pytest.importorskip("torch", reason="the other side of every comparison")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

STEPS = 20
HALF = STEPS // 2
MESH = "data 2 x fsdp 2 x tensor 2"


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Zero:
    return run_zero(tmp_path_factory.mktemp("heads"), STEPS, CLASSIFIERS)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_both_backends_are_one(trained: Run, case: str) -> None:
    found, wanted = (trained(backend, case, "fp64", steps=STEPS) for backend in ("deepspeed", "jax"))
    assert len(set(wanted.losses.values())) == STEPS
    assert_same(found, wanted, "fp64")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_every_zero_stage_is_jax(trained: Run, zero: Zero, case: str, stage: int) -> None:
    assert_same(zero.read(f"{case}-zero{stage}"), trained("jax", case, "fp32", steps=STEPS), "fp32")


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_it_goes_on_upon_the_other_backend(trained: Run, tmp_path: Path, case: str, precision: Precision) -> None:
    """From PyTorch to a mesh, and from JAX to PyTorch."""
    for first, second, mesh in (("deepspeed", "jax", MESHES[MESH]), ("jax", "deepspeed", ONE)):
        train(first, make_run(case, precision, STEPS), stop=HALF, keep=tmp_path / first)
        found = train(second, make_run(case, precision, STEPS, mesh), read_state(tmp_path / first))
        assert sorted(found.losses) == list(range(HALF + 1, STEPS + 1))
        assert_same(found, trained("jax", case, precision, steps=STEPS), precision)
