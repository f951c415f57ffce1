"""fp64 as the referee of fp32: which side has lost digits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.parity.levels import OnePass
from jaxllm.parity.referee import refereed
from jaxllm.parity.results import Check
from tests.parity.subjects import subject

pytest.importorskip("torch", reason="the other side")

NAME, LABEL = "model.layers.1.mlp.up_proj.weight", "padded text"


def test_the_side_that_lost_digits_is_told_from_the_one_that_did_not(tmp_path: Path) -> None:
    examined = subject("llama", tmp_path)
    single, double = (OnePass.of_run(examined.in_precision(each), examined.data) for each in ("fp32", "fp64"))

    # One input: whether another exceeds the bound of fp32 by rounding is not what is asked here.
    def found() -> list[Check]:
        return [check for check in refereed(single, lambda: double) if LABEL in check.name]

    assert [check for check in found() if check.detail.get("referee")] == []

    passes = {side: dict(inputs) for side, inputs in single.passes.items()}
    wrong = passes["jax"][LABEL].gradients[NAME] * 1.001
    passes["jax"][LABEL] = replace(passes["jax"][LABEL], gradients={**passes["jax"][LABEL].gradients, NAME: wrong})
    vars(single)["passes"] = passes
    checks = found()
    (broken,) = [check for check in checks if not check.passed]
    jax, torch = (check for check in checks if check.detail.get("referee"))
    assert broken.name == f"gradient of {NAME}, {LABEL}"
    assert (jax.name, torch.name) == tuple(
        f"referee: {broken.name}, {side} against itself in fp64" for side in ("JAX", "PyTorch")
    )
    assert jax.bound == torch.bound == math.inf
    assert jax.measured == pytest.approx(1e-3, rel=0.01)
    assert torch.measured < 1e-5
