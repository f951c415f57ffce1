"""What a model is for: which head it has, and what its outputs stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.config.objective import (
    ObjectiveConfig,
    ProblemType,
    SequenceClassificationObjective,
    TokenClassificationObjective,
)
from jaxllm.families.spec import HeadKind, LossKind

_LOSSES: Mapping[ProblemType, LossKind] = {
    "single_label_classification": "cross-entropy",
    "multi_label_classification": "binary-cross-entropy",
    "regression": "squared-error",
}


@dataclass(frozen=True)
class Task:
    """head: the kind of head.  labels: names of its outputs, for classification.  problem_type: transformers' key."""

    head: HeadKind = "causal-lm"
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None

    @property
    def loss(self) -> LossKind:
        """How outputs are compared with targets."""
        return _LOSSES[self.problem_type or "single_label_classification"]

    @property
    def described(self) -> dict[str, Any]:
        """What a config.json says of it."""
        if not self.labels:
            return {}
        said: dict[str, Any] = {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
        }
        return said | ({"problem_type": self.problem_type} if self.problem_type else {})


LANGUAGE_MODEL = Task()


def task_of(objective: ObjectiveConfig) -> Task:
    """The task that an objective trains for."""
    match objective:
        case SequenceClassificationObjective():
            return Task("sequence-classification", objective.names, objective.problem_type)
        case TokenClassificationObjective():
            return Task("token-classification", objective.names)
    return Task("seq2seq" if objective.kind == "span-corruption" else objective.kind)
