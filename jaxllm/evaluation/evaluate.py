"""One pass over a split: the loss, and the measures of the task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.backend import Backend
from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, PreparedSplit
from jaxllm.evaluation.labels import Measures, measure_labels
from jaxllm.evaluation.texts import measure_texts
from jaxllm.evaluation.written import Written, write_targets
from jaxllm.families import Task, task_of
from jaxllm.generation.search import Search
from jaxllm.metrics.records import ValidationRecord, perplexity
from jaxllm.run import Run

_CLASSIFICATION = ("sequence-classification", "token-classification")


@dataclass(frozen=True)
class Evaluated:
    """What one pass found.

    loss: per target.  targets: how many.  measures: of labels or of texts that were written; None for language models.
    written: those texts.
    """

    loss: float
    targets: float
    perplexity: float | None
    bits_per_byte: float | None
    measures: Measures | None
    written: tuple[Written, ...] = ()

    def record(self, step: int, seconds: float) -> ValidationRecord:
        """What a run reports of it."""
        watched = self.measures.short() if self.measures is not None else {}
        return ValidationRecord(step, self.loss, self.perplexity, self.bits_per_byte, self.targets, seconds, watched)


def evaluate(backend: Backend, run: Run, data: PreparedData, search: Search | None = None) -> Evaluated:
    """Evaluate a started backend on the validation split (collective).

    search: an encoder-decoder also writes a target for every source, in this way.
    """
    config = run.config
    task = task_of(config.objective)
    labelled = task.head in _CLASSIFICATION
    with BatchPipeline(data, config, "validation", backend.shard) as batches:
        found = backend.evaluate(batches, outputs=labelled)
    loss = found.loss_sum / found.target_tokens if found.target_tokens else float("nan")
    if not labelled:
        bits = _bits_per_byte(config, data.validation, loss)
        written = tuple(write_targets(backend, run, data, search)) if search is not None else ()
        measures = measure_texts([each.written for each in written], [each.target for each in written]) if written else None
        return Evaluated(loss, found.target_tokens, perplexity(loss), bits, measures, written)
    assert found.outputs is not None  # noqa: S101 - they were asked for
    return Evaluated(loss, found.target_tokens, None, None, _measures(task, config, data, found.outputs))


def _measures(task: Task, config: RunConfig, data: PreparedData, outputs_NTL: np.ndarray) -> Measures:
    """Of the rows that are examples and not filling."""
    with BatchPipeline(data, config, "validation") as batches:
        read: list[Batch] = list(batches)
    targets, weights = (np.concatenate([getattr(batch, name) for batch in read]) for name in ("targets", "weights"))
    real = weights.any(axis=1)
    return measure_labels(task, outputs_NTL[real], targets[real], weights[real])


def _bits_per_byte(config: RunConfig, split: PreparedSplit, loss: float) -> float | None:
    """The loss in bits for each byte of text, where every token of it is predicted."""
    if config.objective.kind != "causal-lm" or not split.bytes:
        return None
    return float(loss / np.log(2) * split.tokens / split.bytes)
