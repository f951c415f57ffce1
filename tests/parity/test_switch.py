"""Level 6: changing backend, mesh, processes and ZeRO stage in the middle of a run changes nothing.

Through checkpoints and the command line this is shown in tests/end_to_end/test_resume.py; here the state itself moves.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.config.schema import BackendName, Precision
from jaxllm.state import read_state
from tests.golden.remake_trajectories import STEPS as GOLDEN_STEPS
from tests.parity.conftest import STEPS, Run, Zero
from tests.parity.test_trajectory import assert_same
from tests.parity.trajectories import FAMILIES, KINDS, MESHES, ONE, OTHERS, make_run, train

pytest.importorskip("torch", reason="the other backend")

HALF = STEPS // 2
MESH = "data 2 x fsdp 2 x tensor 2"
Place = tuple[BackendName, str]
JAX, TORCH, ON_MESH, ON_FSDP = ("jax", ""), ("deepspeed", ""), ("jax", MESH), ("jax", "fsdp 8")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "second"), [(JAX, TORCH), (TORCH, JAX), (TORCH, ON_MESH), (ON_MESH, TORCH), (ON_MESH, ON_FSDP)]
)
def test_half_here_and_half_there_in_double_precision(
    trained: Run, tmp_path: Path, family: str, first: Place, second: Place
) -> None:
    runs = [make_run(family, "fp64", STEPS, MESHES[mesh] if mesh else ONE) for _, mesh in (first, second)]
    train(first[0], runs[0], stop=HALF, keep=tmp_path / "state")
    found = train(second[0], runs[1], read_state(tmp_path / "state"))
    assert sorted(found.losses) == list(range(HALF + 1, STEPS + 1))
    assert_same(found, trained("jax", family, "fp64"), "fp64")


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *(pytest.param(each, "fp64", marks=[] if each in (*KINDS, "t5") else pytest.mark.nightly) for each in OTHERS),
        *(pytest.param(each, "fp32", marks=pytest.mark.nightly) for each in OTHERS),
    ],
)
def test_every_family_goes_on_upon_a_mesh(trained: Run, tmp_path: Path, family: str, precision: Precision) -> None:
    half, mesh = GOLDEN_STEPS // 2, MESHES[MESH]
    train("deepspeed", make_run(family, precision, GOLDEN_STEPS), stop=half, keep=tmp_path / "state")
    found = train("jax", make_run(family, precision, GOLDEN_STEPS, mesh), read_state(tmp_path / "state"))
    assert sorted(found.losses) == list(range(half + 1, GOLDEN_STEPS + 1))
    assert_same(found, trained("jax", family, precision, steps=GOLDEN_STEPS), precision)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_mesh_to_zero_3_over_two_processes(trained: Run, zero: Zero, family: str) -> None:
    found = zero.read(f"{family}-to-zero3")
    assert sorted(found.losses) == list(range(HALF + 1, STEPS + 1))
    assert_same(found, trained("jax", family, "fp32"), "fp32")


@pytest.mark.parametrize("mesh", ["", MESH])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_zero_2_over_two_processes_to_jax(trained: Run, zero: Zero, family: str, mesh: str) -> None:
    run = make_run(family, "fp32", STEPS, MESHES[mesh] if mesh else ONE)
    found = train("jax", run, read_state(zero.folder / f"zero2-{family}"))
    assert sorted(found.losses) == list(range(HALF + 1, STEPS + 1))
    assert_same(found, trained("jax", family, "fp32"), "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_from_zero_2_over_two_processes_to_stage_0_on_one(trained: Run, zero: Zero, family: str) -> None:
    found = train("deepspeed", make_run(family, "fp32", STEPS), read_state(zero.folder / f"zero2-{family}"))
    assert_same(found, trained("jax", family, "fp32"), "fp32")
