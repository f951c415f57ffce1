"""sequence-classification and token-classification: labels of a text, a pair of texts, or of every word.

R rows, S tokens per row, L labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.objective import LabelledObjective, TokenClassificationObjective
from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.prepare import PreparedSplit
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.objectives.examples import Indices
from jaxllm.objectives.rows import TextRows, Texts


class LabelledTexts:
    """The labelled examples of a split, one in a row."""

    def __init__(self, split: PreparedSplit, tokenizer: Tokenizer, config: RunConfig, objective: LabelledObjective) -> None:
        """DataError when an example is longer than `data.sequence_length` and `data.truncate` is off."""
        second = "second" if "second" in split.columns else None
        template = tokenizer.single_template if second is None else tokenizer.pair_template
        self._texts = Texts(split, template, config.data.sequence_length, second=second)
        if not config.data.truncate:
            self._texts.check_lengths("text" if second is None else "pair of texts", "data.sequence_length")
        self._split = split
        self._objective = objective

    def __len__(self) -> int:
        return int(self._split.documents.size)

    def batch(self, indices_R: Indices, places_R: Indices) -> Batch:  # noqa: ARG002 - the same in every epoch
        """The batch of these examples."""
        rows = self._texts.rows(indices_R)
        targets: NDArray[np.int32] | NDArray[np.float32]
        if isinstance(self._objective, TokenClassificationObjective):
            targets, weights = self._of_words(indices_R, rows)
        else:
            targets, weights = self._of_texts(indices_R)
        return Batch(rows.tokens, targets, weights, rows.positions, rows.segments, token_types=rows.token_types)

    def _of_texts(self, indices_R: Indices) -> tuple[NDArray[np.int32] | NDArray[np.float32], NDArray[np.float32]]:
        """Targets and weights: the number of the label (R, 1), or zeros and ones or values (R, L)."""
        labels = [self._labels(index) for index in indices_R]
        problem = getattr(self._objective, "problem_type", None)
        if problem == "multi_label_classification":
            targets = np.zeros((len(labels), len(self._objective.names)), np.float32)
            for row, numbers in enumerate(labels):
                targets[row, numbers.astype(np.int64)] = 1.0
            return targets, np.ones(targets.shape, np.float32)
        values = np.stack(labels) if labels else np.zeros((0, 1), np.float32)
        targets = values if problem == "regression" else values.astype(np.int32)
        return targets, np.ones(targets.shape, np.float32)

    def _of_words(self, indices_R: Indices, rows: TextRows) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Targets and weights (R, S): the label of a word at its first token."""
        targets = np.full(rows.tokens.shape, -1, np.int32)
        for row, index in enumerate(indices_R):
            inside = rows.inside[row] >= 0
            targets[row, inside] = self._labels(index)[rows.inside[row, inside]]
        known = targets >= 0
        return np.where(known, targets, np.int32(0)), known.astype(np.float32)

    def _labels(self, index: np.int64) -> NDArray[np.float32]:
        return np.asarray(self._split.columns["labels"].document(int(self._split.documents[index])), np.float32)
