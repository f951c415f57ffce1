"""Batch: what one step reads, as numpy arrays, already shifted and weighted.

Shape legend: B sequences, S tokens per sequence, T targets per sequence, R tokens per source of an encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shard:
    """Which rows of a global batch this process reads: rows [index * G / count, (index + 1) * G / count)."""

    index: int
    count: int


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that this process reads.

    inputs_BS (int32): tokens the model sees; of an encoder-decoder, those its decoder sees.
    targets_BT: the token or label to predict at each position (int32, T = S), or of the whole row: a label (int32, T = 1),
        several labels as zeros and ones (float32, T of them) or values (float32); 0 where weights is 0.
    weights_BT (float32): weight of each target's loss; 0 for padding and for what is not to be predicted.
    positions_BS (int32): position within the document (or within the sequence when attention may cross documents).
    segments_BS (int32): which document of the sequence a token belongs to, from 1; 0 is padding.  A token attends only to
        tokens of the same segment.
    token_types_BS (int32): which text of a pair a token belongs to; None: all to the first.
    source_BR, source_segments_BR (int32): tokens an encoder-decoder's encoder sees, and their segments; None without one.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32] | NDArray[np.float32]
    weights: NDArray[np.float32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]
    token_types: NDArray[np.int32] | None = None
    source: NDArray[np.int32] | None = None
    source_segments: NDArray[np.int32] | None = None

    @property
    def rows(self) -> int:
        """Number of sequences, B."""
        return int(self.inputs.shape[0])

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence, S."""
        return int(self.inputs.shape[1])

    @property
    def target_tokens(self) -> float:
        """Sum of the loss weights: the denominator of the loss, for these rows only."""
        return float(self.weights.sum(dtype=np.float64))

    def fields(self) -> dict[str, NDArray[Any]]:
        """Every array of the batch by its name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    def map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Batch:
        """The batch with every array changed in the same way."""
        return Batch(**{name: change(array) for name, array in self.fields().items()})

    def select(self, start: int, stop: int) -> Batch:
        """Rows [start, stop)."""
        return self.map(lambda array: array[start:stop])
