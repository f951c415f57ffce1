"""Level 7 on runs made by hand; tests/parity/test_cli.py measures it on real ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from jaxllm.parity.noise import noise
from jaxllm.parity.results import Check, Curve
from jaxllm.parity.tolerances import NOISE_STEPS, noise_bound
from tests.parity.finished import HandMade, finished

Errors = tuple[float, ...]
TIMES = -(-NOISE_STEPS // 4)
EXACT = (2.0, 1.5, 1.25, 1.0)


def _losses(errors: Errors, times: int) -> list[float]:
    """The exact losses with these relative errors, over and over."""
    return [loss * (1.0 + error) for loss, error in zip(EXACT, errors, strict=True)] * times


def _measure(folder: Path, jax: Errors, deepspeed: Errors, control: Errors, times: int = TIMES) -> list[Check]:
    params = {4: {"a": np.ones(3)}}
    made = {
        ("jax", "fp32"): finished(folder, "jax", EXACT * times, params),
        ("deepspeed", "fp32"): finished(folder, "deepspeed", EXACT * times, params),
        ("jax", "bf16"): finished(folder, "jax, bf16", _losses(jax, times), params),
        ("deepspeed", "bf16"): finished(folder, "deepspeed, bf16", _losses(deepspeed, times), params),
    }
    runs = HandMade(made, finished(folder, "control", _losses(control, times), params))
    found = list(noise(runs))  # type: ignore[arg-type]
    curves = [each for each in found if isinstance(each, Curve)]
    assert [(curve.name, curve.reference) for curve in curves[:5]] == [
        ("jax", None),
        ("jax, bf16", "jax"),
        ("deepspeed", None),
        ("deepspeed, bf16", "deepspeed"),
        ("deepspeed, bf16", "jax, bf16"),
    ]
    return [each for each in found if isinstance(each, Check)]


def test_backends_that_round_alike_pass(tmp_path: Path) -> None:
    loss, parameters = _measure(tmp_path, (1e-4, -2e-4, 1e-4, 3e-4), (1.5e-4, -1.5e-4, 1e-4, 2.5e-4), (0.0,) * 4)
    assert loss.passed
    assert loss.bound == pytest.approx(noise_bound([loss.detail["jax_from_fp32"], loss.detail["deepspeed_from_fp32"]]))
    assert loss.measured == pytest.approx(4.3e-5, rel=0.05)
    assert parameters.bound == math.inf


@pytest.mark.parametrize(
    ("jax", "deepspeed"),
    [
        ((1e-4, 1e-4, 1e-4, 1e-4), (1e-3, 1e-3, 1e-3, 1e-3)),  # a backend that rounds where the other does not
        ((1e-4, -1e-4, 1e-4, -1e-4), (-1e-4, 1e-4, 1e-4, 1e-4)),  # roundings that have nothing in common
    ],
)
def test_backends_that_round_differently_fail(tmp_path: Path, jax: Errors, deepspeed: Errors) -> None:
    loss, _, control = _measure(tmp_path, jax, deepspeed, tuple(error + 1e-7 for error in jax))
    assert not loss.passed
    assert control.passed
    assert not control.detail["amplifies"]


def test_a_run_that_amplifies_rounding_is_told_apart(tmp_path: Path) -> None:
    loss, _, control = _measure(tmp_path, (0.0, 0.0, 1e-3, 1e-1), (0.0, 0.0, -1e-3, -1e-1), (0.0, 0.0, 2e-3, 3e-1))
    assert not loss.passed
    assert control.detail["amplifies"]


def test_few_steps_have_no_bound(tmp_path: Path) -> None:
    loss, _ = _measure(tmp_path, (1e-4,) * 4, (1e-3,) * 4, (0.0,) * 4, times=2)
    assert loss.bound == math.inf


def test_the_bound_is_between_the_two_distances() -> None:
    assert noise_bound([3e-5, 4e-5]) == pytest.approx(3.5355e-5, rel=1e-4)
    assert noise_bound([1e-5, 1e-5]) == pytest.approx(1e-5)
