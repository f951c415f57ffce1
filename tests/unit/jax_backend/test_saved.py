"""What the forward pass keeps for the backward pass: the outputs of the scan over layers in the program that JAX traces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jaxllm.jax_backend.abstract import abstract_arguments
from jaxllm.jax_backend.assembly import assemble
from jaxllm.jax_backend.mesh import create_mesh
from tests.unit.jax_backend.cases import FAMILIES, LLAMA, make_run


def forward_scans(jaxpr: Any, layers: int) -> Iterator[Any]:
    """Every forward scan over that many steps, wherever it stands in the program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers and not equation.params["reverse"]:
            yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from forward_scans(inner, layers)


@pytest.mark.parametrize(
    ("model", "period", "remat", "kept"),
    [
        (LLAMA, 1, "full", 1),
        (LLAMA, 1, ("layer_input", "mlp_norm"), 2),
        ({**FAMILIES["gemma2"], "num_hidden_layers": 4}, 2, "full", 1),  # with a window and without, in turn
    ],
)
def test_weights_are_not_kept_as_if_they_were_activations(model: Any, period: int, remat: Any, kept: int) -> None:
    run = make_run(model, jax={"remat": remat, "cpu_devices": 1})
    mesh = create_mesh(run.config)
    parts = assemble(run, mesh)
    program = parts.train_step.trace(*abstract_arguments(parts, run, mesh)).jaxpr
    turns = run.model.spec.layers // period
    (scan,) = forward_scans(program.jaxpr, turns)
    outputs = [variable.aval.shape for variable in scan.outvars[scan.params["num_carry"] :]]
    batch, length = run.config.training.global_batch, run.config.data.sequence_length
    wanted = (turns, batch, length, run.model.spec.hidden_size)
    assert [shape for shape in outputs if len(shape) > 1] == [wanted] * kept * period
