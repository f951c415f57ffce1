"""How far one run is from another, on runs made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.parity import trajectory as trajectory_module
from jaxllm.parity.distance import Reference
from jaxllm.parity.layouts import Layout, deepspeed_layouts, deepspeed_mesh_layouts, mesh_layouts, one_device
from jaxllm.parity.results import Check, Curve
from jaxllm.parity.runs import MAX_STATES, state_spacing
from jaxllm.parity.trajectory import trajectory
from tests.parity.finished import HandMade, finished
from tests.parity.trajectories import make_run

A, B = np.array([1.0, 2.0]), np.array([4.0])


def test_losses_and_parameters_are_relative_and_the_worst_is_named(tmp_path: Path) -> None:
    reference = finished(tmp_path, "one", [4.0, 2.0, 1.0], {1: {"a": A, "b": B}, 3: {"a": A, "b": B}})
    other = finished(tmp_path, "two", [4.0, 2.2, 1.0], {1: {"a": A, "b": B}, 3: {"a": A, "b": B + 1.0}})
    comparison = Reference(reference).compare(other, "trajectory")
    assert comparison.curve.loss_error == pytest.approx({1: 0.0, 2: 0.1, 3: 0.0})
    assert comparison.curve.parameter_distance == pytest.approx({1: 0.0, 3: 0.25})
    assert (comparison.loss.step, comparison.parameters.step, comparison.parameters.parameter) == (2, 3, "b")
    assert (comparison.curve.name, comparison.curve.reference) == ("two", "one")


def test_after_a_switch_only_later_steps_count(tmp_path: Path) -> None:
    reference = finished(tmp_path, "one", [4.0, 2.0, 1.0], {1: {"a": A}, 3: {"a": A}})
    other = finished(tmp_path, "two", [8.0, 2.0, 1.0], {1: {"a": A * 2.0}, 3: {"a": A}})
    comparison = Reference(reference).compare(other, "switch", after=1)
    assert comparison.curve.loss_error == {2: 0.0, 3: 0.0}
    assert comparison.curve.parameter_distance == {3: 0.0}
    assert comparison.curve.switched_at == 1


def test_elements_without_a_gradient_are_not_compared(tmp_path: Path) -> None:
    sizes = {"a": np.array([1.0, 1e-14])}
    reference = finished(tmp_path, "one", [1.0], {1: {"a": A}}, sizes)
    other = finished(tmp_path, "two", [1.0], {1: {"a": A + np.array([0.0, 0.5])}}, sizes)
    assert Reference(reference).compare(other, "trajectory").parameters.error == 0.0
    everywhere = finished(tmp_path, "three", [1.0], {1: {"a": A}})
    assert Reference(everywhere).compare(other, "trajectory").parameters.error == 0.25


def test_idle_parameters_are_not_compared(tmp_path: Path) -> None:
    """Their gradient is noise, which in fp32 is well above what counts as none."""
    name = "bert.encoder.layer.0.attention.self.key.bias"
    sizes = {"a": np.ones(2), name: np.full(2, 1e-8)}
    model = make_run("bert", "fp32", 1)
    one, two = (
        replace(finished(tmp_path, run, [1.0], {1: {"a": A, name: A * at}}, sizes, "fp32"), run=model)
        for run, at in (("one", 1.0), ("two", 3.0))
    )
    assert Reference(one).compare(two, "trajectory").parameters.error == 0.0


def test_nan_is_the_worst_there_is(tmp_path: Path) -> None:
    reference = finished(tmp_path, "one", [1.0, 1.0], {1: {"a": A, "b": B}})
    other = finished(tmp_path, "two", [9.0, math.nan], {1: {"a": A * 9.0, "b": B * math.nan}})
    comparison = Reference(reference).compare(other, "trajectory")
    assert (comparison.loss.step, comparison.parameters.parameter) == (2, "b")
    assert math.isnan(comparison.loss.error)
    assert math.isnan(comparison.parameters.error)


@pytest.mark.parametrize(
    ("parameters", "precision", "steps", "wanted"),
    [
        (30_000, "fp64", 25, 1),
        (30_000, "fp64", 100, 4),  # no more than MAX_STATES
        (5_500_000, "fp64", 100, 7),  # 132 MB each: 15 of them
        (10**9, "fp32", 100, 50),  # 12 GB each, yet one in the middle to switch at
        (10**9, "fp32", 3, 1),
    ],
)
def test_states_are_spaced_so_that_they_fit_on_the_disk(parameters: int, precision: Any, steps: int, wanted: int) -> None:
    assert state_spacing(parameters, precision, steps) == wanted
    assert steps / wanted <= max(MAX_STATES, 3)


# ------------------------------------------------------------------------------------------------- the trajectory level


def _checks(made: HandMade) -> tuple[list[Check], list[Curve]]:
    found = list(trajectory(made, "fp64", [one_device("deepspeed", "fp64")]))  # type: ignore[arg-type]
    return [each for each in found if isinstance(each, Check)], [each for each in found if isinstance(each, Curve)]


def test_a_trajectory_within_its_bounds(tmp_path: Path) -> None:
    jax = finished(tmp_path, "jax", [2.0, 1.0], {2: {"a": A}})
    torch = finished(tmp_path, "torch", [2.0, 1.0 + 1e-14], {2: {"a": A + 1e-13}})
    made = HandMade({("jax", "fp64"): jax, ("deepspeed", "fp64"): torch})
    checks, curves = _checks(made)
    assert [check.passed for check in checks] == [True, True]
    assert [(check.bound, check.detail["worst_step"]) for check in checks] == [(1e-12, 2), (1e-11, 2)]
    assert [curve.name for curve in curves] == ["jax", "torch"]


@pytest.mark.parametrize(("control_loss", "amplifies"), [(1.0 + 1e-15, False), (1.0 + 1e-8, True)])
def test_a_broken_bound_is_followed_by_jax_against_itself(tmp_path: Path, control_loss: float, amplifies: bool) -> None:
    jax = finished(tmp_path, "jax", [2.0, 1.0], {2: {"a": A}})
    torch = finished(tmp_path, "torch", [2.0, 1.0 + 1e-9], {2: {"a": A}})
    control = finished(tmp_path, "control", [2.0, control_loss], {2: {"a": A}})
    checks, _ = _checks(HandMade({("jax", "fp64"): jax, ("deepspeed", "fp64"): torch}, control))
    assert [check.passed for check in checks] == [False, True, True]
    assert checks[0].measured == pytest.approx(1e-9)
    assert (checks[2].bound, checks[2].detail["amplifies"]) == (math.inf, amplifies)
    assert trajectory_module.TOLERANCES["fp64"].trajectory_loss < checks[0].measured


def test_layouts_have_the_names_that_people_use() -> None:
    names = [layout.name for layout in (*mesh_layouts("fp32"), *deepspeed_layouts("fp32", (0, 3), 2))]
    assert names == [
        "JAX, data 8",
        "JAX, fsdp 8",
        "JAX, fsdp 4 x tensor 2",
        "JAX, data 2 x fsdp 2 x tensor 2",
        "JAX, data 2 x context 4",
        "JAX, fsdp 2 x tensor 2 x context 2",
        "DeepSpeed ZeRO 0, 2 processes",
        "DeepSpeed ZeRO 3, 2 processes",
    ]
    assert [layout.name for layout in deepspeed_mesh_layouts("fp32")] == [
        "DeepSpeed ZeRO 3, tensor 2, 2 processes",
        "DeepSpeed ZeRO 2, context 2, 2 processes",
        "DeepSpeed ZeRO 1, tensor 2, context 2, 4 processes",
    ]
    assert [layout.data_parallel for layout in deepspeed_mesh_layouts("fp64")] == [1, 1, 1]
    assert [layout.name for layout in deepspeed_layouts("fp64", (0, 1, 2, 3), 1)] == ["PyTorch, 1 process"]
    assert Layout("jax", "bf16", micro_batch=2).name == "JAX, 1 device, micro-batches of 2, bf16"
    layouts = [*mesh_layouts("fp32"), *mesh_layouts("fp64"), *deepspeed_layouts("fp32", (0, 1, 2, 3), 1)]
    assert len({layout.slug for layout in layouts}) == len(layouts)
