"""Measures of labels and numbers, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from jaxllm.evaluation import measure_labels
from jaxllm.evaluation.evaluate import Evaluated
from jaxllm.evaluation.report import Report, draw_confusion
from jaxllm.families import Task

SINGLE = Task("sequence-classification", ("a", "b", "c"), "single_label_classification")


def outputs_of(labels: list[int], count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[labels][:, None]


def test_one_label() -> None:
    true, found = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    targets = np.array(true, np.int32)[:, None]
    measures = measure_labels(SINGLE, outputs_of(found, 3), targets, np.ones_like(targets, np.float32))
    assert measures.examples == 6
    assert measures.values["accuracy"] == pytest.approx(4 / 6)
    assert measures.confusion is not None
    assert measures.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert measures.per_label["b"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "support": 2.0})
    assert measures.values["f1_macro"] == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    assert measures.values["f1_micro"] == pytest.approx(4 / 6)
    # (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c 4, s 6, p (2, 3, 1), t (2, 2, 2)
    assert measures.values["matthews"] == pytest.approx((4 * 6 - 12) / math.sqrt((36 - 14) * (36 - 12)))
    assert list(measures.short()) == ["accuracy", "f1_macro", "matthews"]


def test_words_without_weight_do_not_count() -> None:
    task = Task("token-classification", ("a", "b", "c"))
    outputs = np.eye(3, dtype=np.float32)[[[0, 1, 2, 2]]]
    targets, weights = np.array([[0, 1, 1, 0]], np.int32), np.array([[1, 1, 1, 0]], np.float32)
    assert measure_labels(task, outputs, targets, weights).values["accuracy"] == pytest.approx(2 / 3)


def test_several_labels() -> None:
    task = Task("sequence-classification", ("a", "b"), "multi_label_classification")
    outputs = np.array([[[1.0, -1.0]], [[1.0, 1.0]], [[-1.0, -1.0]]], np.float32)
    targets = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    measures = measure_labels(task, outputs, targets, np.ones_like(targets))
    assert measures.values["accuracy"] == pytest.approx(2 / 3)
    assert measures.per_label["a"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1.0})
    assert measures.confusion is None


def test_numbers() -> None:
    task = Task("sequence-classification", ("0",), "regression")
    outputs = np.array([[[1.0]], [[2.0]], [[4.0]]], np.float32)
    targets = np.array([[1.0], [3.0], [5.0]], np.float32)
    values = measure_labels(task, outputs, targets, np.ones_like(targets)).values
    assert values["mean_squared_error"] == pytest.approx(2 / 3)
    assert values["spearman"] == pytest.approx(1.0)
    assert values["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1])
    constant = measure_labels(task, outputs, np.zeros_like(targets), np.ones_like(targets))
    assert math.isnan(constant.values["pearson"])
    assert constant.to_json()["values"]["pearson"] is None


def test_the_report_and_the_picture(tmp_path: Path) -> None:
    targets = np.array([[0], [1], [2]], np.int32)
    measures = measure_labels(SINGLE, outputs_of([0, 1, 1], 3), targets, np.ones_like(targets, np.float32))
    report = Report("runs/a", "jax", "sequence-classification", 7, 3, Evaluated(0.5, 3.0, None, None, measures)).to_json()
    assert report["step"] == 7
    assert report["perplexity"] is None
    assert report["measures"]["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert measures.confusion is not None
    draw_confusion(measures.labels, measures.confusion, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
