"""`--model FOLDER`: a Hugging Face checkpoint of a supported family, JAX against transformers, in fp64 and its own dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from jaxllm.config import RunConfig
from jaxllm.config.objective import CausalLmObjective, ObjectiveConfig
from jaxllm.config.schema import ModelConfig, Precision
from jaxllm.errors import CheckpointError
from jaxllm.families import FAMILIES, Model, architectures, resolve_model, task_of
from jaxllm.parity.levels import OnePass
from jaxllm.parity.referee import refereed
from jaxllm.parity.results import Check
from jaxllm.run import Run
from jaxllm.state.initial import check_shapes, pretrained_weights
from jaxllm.state.initial import compare_folder as compare_weights

MAX_TOKENS = 512
"""Tokens per sequence: enough to show a mistake in positions."""

_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder of a Hugging Face model, and the objective that its head is for."""

    folder: Path
    model: Model
    objective: ObjectiveConfig

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """JaxllmError for a folder that holds no checkpoint, lacks weights, or has a head that jaxllm does not."""
        described = ModelConfig.model_validate({"from": str(folder)})
        objective = _objective(folder)
        model = resolve_model(described, task=task_of(objective))
        if model.spec.head.pool == "last" and model.spec.head.padding is None:
            raise CheckpointError(
                f"{folder / 'config.json'} has no pad_token_id, by which transformers finds the end of a row; set it to the "
                "tokenizer's padding token"
            )
        check_shapes(model, pretrained_weights(model, folder))
        return cls(folder, model, objective)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which weights of the folder are left out, and which the folder lacks."""
        return tuple(compare_weights(self.model, self.folder).sentences(self.folder))

    def compare(self) -> Iterator[Check]:
        """Logits, loss and every gradient on random tokens, in fp64 and in its own dtype.

        In bf16 there is no bound: the figures say how far two roundings to 8 bits are apart.
        """
        for precision in dict.fromkeys(("fp64", _own_precision(self.folder))):
            yield from refereed(self._one_pass(precision), lambda: self._one_pass("fp64"))

    def _one_pass(self, precision: Precision) -> OnePass:
        return OnePass.of_model(Run(self._config(precision), self.model, total_steps=1))

    def _config(self, precision: Precision) -> RunConfig:
        return RunConfig.model_validate(
            {
                "name": "checkpoint",
                "model": {"from": str(self.folder)},
                "objective": self.objective.model_dump(),
                "data": {
                    "tokenizer": {"from": str(self.folder)},
                    "sequence_length": min(MAX_TOKENS, self.model.spec.max_positions),
                },
                "optimizer": {"learning_rate": 0.0},
                "training": {"steps": 1, "global_batch": 2, "precision": precision},
            }
        )


def _objective(folder: Path) -> ObjectiveConfig:
    """What the head that config.json names is trained for."""
    written = _written(folder)
    family, named = str(written.get("model_type")), written.get("architectures") or []
    if family not in FAMILIES:
        return CausalLmObjective()  # resolving the model says what is wrong
    heads = {name: head for head, name in architectures(family).items()}
    known = [heads[name] for name in named if name in heads]
    usual = next(iter(heads.values()))
    if not known and usual != "causal-lm" and len(heads) > 1:
        said = ", ".join(map(str, named)) or "none"
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures: {said} is no head of family {family}; use one of {', '.join(heads)}"
        )
    kind = known[0] if known else usual
    document: dict[str, Any] = {"kind": kind}
    if kind in ("sequence-classification", "token-classification"):
        document["num_labels"] = len(written.get("id2label") or ()) or written.get("num_labels") or 2
    if kind == "sequence-classification":
        # As transformers decides where the file does not say.
        default = "regression" if document["num_labels"] == 1 else "single_label_classification"
        document["problem_type"] = written.get("problem_type") or default
    return TypeAdapter[ObjectiveConfig](ObjectiveConfig).validate_python(document)


def _written(folder: Path) -> dict[str, Any]:
    """config.json; empty if there is none that can be read, which resolving the model complains of."""
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def _own_precision(folder: Path) -> Precision:
    written = _written(folder)
    name = str(written.get("dtype") or written.get("torch_dtype") or "float32")
    if name not in _PRECISIONS:
        raise CheckpointError(f"{folder / 'config.json'} says dtype {name!r}; only {', '.join(_PRECISIONS)} are compared")
    return _PRECISIONS[name]
