"""Measures of labels and of numbers: scikit-learn's and scipy's.

N examples (or, of word labels, words), L labels or values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.families import Task


@dataclass(frozen=True)
class Measures:
    """What was measured on N examples.

    values: in the order in which a person reads them.  per_label: label -> precision, recall, f1, support.  confusion_LL:
    rows are the labels that are true, columns those predicted; None where an example has any number of them.
    """

    examples: int
    values: Mapping[str, float]
    labels: tuple[str, ...] = ()
    per_label: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    confusion: NDArray[np.int64] | None = None

    def to_json(self) -> dict[str, Any]:
        """In JSON's types; what is not finite becomes null."""
        confusion = None if self.confusion is None else self.confusion.tolist()
        return {
            "examples": self.examples,
            "values": {name: value if math.isfinite(value) else None for name, value in self.values.items()},
            "per_label": {label: dict(values) for label, values in self.per_label.items()},
            "labels": list(self.labels),
            "confusion": confusion,
        }

    def short(self) -> dict[str, float]:
        """The few that a person watches while a model trains."""
        watched = ("accuracy", "f1_macro", "f1_micro", "matthews", "pearson", "spearman")
        chosen = {name: self.values[name] for name in watched if name in self.values}
        if "matthews" in chosen:  # of one label an example: micro F1 is the accuracy
            chosen.pop("f1_micro", None)
        return chosen


def measure_labels(
    task: Task, outputs_NTL: NDArray[np.floating], targets_NT: NDArray[Any], weights_NT: NDArray[Any]
) -> Measures:
    """The measures of a classification or regression.

    outputs: of the model, (N, T, L).  targets, weights: as in a batch, (N, T), or (N, L) for several labels or values.
    """
    if task.problem_type == "regression":
        return _of_values(task.labels, outputs_NTL[:, 0], targets_NT)
    if task.problem_type == "multi_label_classification":
        # A label is predicted where its probability is above one half, which is where its output is above zero.
        return _of_sets(task.labels, outputs_NTL[:, 0] > 0, targets_NT > 0)
    counted = weights_NT > 0
    return _of_labels(task.labels, outputs_NTL.argmax(axis=-1)[counted], targets_NT[counted].astype(np.int64))


def _of_labels(labels: tuple[str, ...], found_N: NDArray[np.int64], true_N: NDArray[np.int64]) -> Measures:
    """One label an example."""
    from sklearn import metrics

    numbers = np.arange(len(labels))
    values = {"accuracy": float(metrics.accuracy_score(true_N, found_N))}
    values |= _averages(numbers, found_N, true_N)
    values["matthews"] = float(metrics.matthews_corrcoef(true_N, found_N))
    confusion = metrics.confusion_matrix(true_N, found_N, labels=numbers)
    return Measures(found_N.size, values, labels, _per_label(labels, numbers, found_N, true_N), confusion)


def _of_sets(labels: tuple[str, ...], found_NL: NDArray[np.bool_], true_NL: NDArray[np.bool_]) -> Measures:
    """Any number of labels an example; its accuracy counts examples whose labels are all right."""
    from sklearn import metrics

    numbers = np.arange(len(labels))
    found, true = found_NL.astype(np.int64), true_NL.astype(np.int64)
    values = {"accuracy": float(metrics.accuracy_score(true, found)), **_averages(numbers, found, true)}
    return Measures(found.shape[0], values, labels, _per_label(labels, numbers, found, true))


def _of_values(names: tuple[str, ...], found_NL: NDArray[np.floating], true_NL: NDArray[np.floating]) -> Measures:
    """Numbers.  Correlations are means over the values of an example; they are not defined where nothing varies."""
    from scipy import stats
    from sklearn import metrics

    found, true = found_NL.astype(np.float64), true_NL.astype(np.float64)
    columns = [(found[:, value], true[:, value]) for value in range(len(names))]
    varies = all(np.ptp(a) > 0 and np.ptp(b) > 0 for a, b in columns) and found.shape[0] > 1
    correlations = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    values = {
        "mean_squared_error": float(metrics.mean_squared_error(true, found)),
        "mean_absolute_error": float(metrics.mean_absolute_error(true, found)),
        **{
            name: float(np.mean([correlation(*column).statistic for column in columns])) if varies else math.nan
            for name, correlation in correlations.items()
        },
    }
    return Measures(found.shape[0], values, names)


def _averages(numbers: NDArray[np.int64], found: NDArray[np.int64], true: NDArray[np.int64]) -> dict[str, float]:
    """Precision, recall and F1 over all labels; what would be divided by zero is zero."""
    from sklearn.metrics import precision_recall_fscore_support

    values: dict[str, float] = {}
    names = ("precision", "recall", "f1")
    for average in ("macro", "micro"):
        scores = precision_recall_fscore_support(true, found, labels=numbers, average=average, zero_division=0.0)
        values |= {f"{name}_{average}": float(score) for name, score in zip(names, scores, strict=False)}
    return values


def _per_label(
    labels: tuple[str, ...], numbers: NDArray[np.int64], found: NDArray[np.int64], true: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(true, found, labels=numbers, average=None, zero_division=0.0)
    names = ("precision", "recall", "f1", "support")
    return {
        label: {name: float(score[number]) for name, score in zip(names, scores, strict=True)}
        for number, label in enumerate(labels)
    }
