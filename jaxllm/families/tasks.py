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
from jaxllm.families.spec import HeadKind, HeadSpec, LossKind

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
    def reads_padding(self) -> bool:
        """Whether it matters to the model which token fills rows up: it has an embedding of its own, or a place in the head."""
        return self.head != "causal-lm"

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
DECODER_DROPOUT = 0.1


def decoder_head(task: Task, padding: int | None, dropout: float | None) -> HeadSpec:
    """The head of a decoder, as transformers has it for all of them.

    padding: the config's pad_token_id.  dropout: its classifier_dropout; None: transformers' default.  A sequence classifier
    has neither dropout nor bias.
    """
    match task.head:
        case "sequence-classification":
            return HeadSpec(task.head, len(task.labels), task.loss, bias=False, pool="last", padding=padding)
        case "token-classification":
            rate = DECODER_DROPOUT if dropout is None else dropout
            return HeadSpec(task.head, len(task.labels), task.loss, dropout=rate)
    return HeadSpec()


def task_of(objective: ObjectiveConfig) -> Task:
    """The task that an objective trains for."""
    match objective:
        case SequenceClassificationObjective():
            return Task("sequence-classification", objective.names, objective.problem_type)
        case TokenClassificationObjective():
            return Task("token-classification", objective.names)
    return Task("seq2seq" if objective.kind == "span-corruption" else objective.kind)
