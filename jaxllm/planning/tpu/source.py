"""Which part of jaxllm an operation of a compiled program comes from, by the Python frames that XLA keeps with it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxllm.planning.tpu.hlo import Instruction, Module

COMPILER = "compiler"
"""Operations that the compiler made and that no line of Python asked for."""

_PACKAGE = re.compile(r"jaxllm/jax_backend/(.*)\.py$")

# Files whose functions serve several parts of the model; what they do belongs to whoever called them.
_HELPERS = frozenset(
    {
        "gathering", "model/linear", "model/parameter", "model/dropout", "model/tap", "sharding", "precision", "network",
        "remat", "attention/__init__", "model/grouped",
    }
)  # fmt: skip

# Files that are another's part in disguise.
_FILES: Mapping[str, str] = {"chunked_loss": "loss"}

# Functions of files that hold more than one part.
_FUNCTIONS: Mapping[tuple[str, str], str] = {
    ("model/transformer", "_embed"): "embedding",
    ("model/transformer", "outputs"): "head",
    ("model/transformer", "_final"): "head",
    ("model/transformer", "projection"): "head",
    ("model/scan", "run_layers"): "layer scan",
    ("model/scan", "_scan"): "layer scan",
    ("model/scan", "layer"): "layer scan",
    ("model/scan", "period"): "layer scan",
    ("model/transformer", "_rotary"): "rope",
    ("model/stack", "_take"): "layer scan",
    ("model/block", "__call__"): "residual",
    ("chunked_loss", "_product"): "head",
}


def source_of(module: Module, instruction: Instruction) -> str:
    """`mlp`, `attention`, `norm`, `head`, `optimizer`...: the innermost file of the JAX backend that is a part of the model."""
    for candidate in (instruction, *_inside(module, instruction)):
        for frame in module.stack(candidate.frame):
            match = _PACKAGE.search(frame.file)
            if match is None or match.group(1) in _HELPERS:
                continue
            file, function = match.group(1), frame.function.rsplit(".", 1)[-1]
            part = "attention" if file.startswith("attention/") else _FILES.get(file, file.rsplit("/", 1)[-1])
            return _FUNCTIONS.get((file, function), part)
    return COMPILER


def _inside(module: Module, instruction: Instruction) -> list[Instruction]:
    """What a fusion without a frame of its own fuses, last first: its root says best what it is for."""
    called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
    return list(reversed(module.computations.get(called, {}).values())) if called else []


def phase_of(op_name: str) -> str:
    """`forward`, `recompute`, `backward` or `update`, by JAX's name stack."""
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "update"
