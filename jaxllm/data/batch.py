"""Batch: what one step reads, as numpy arrays, already shifted and weighted.

Shape legend: B sequences, S tokens per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    inputs_BS (int32): tokens the model sees.
    targets_BS (int32): the token to predict at each position; 0 where weights is 0.
    weights_BS (float32): weight of each position's loss; 0 for padding and for targets in the next document.
    positions_BS (int32): position within the document (or within the sequence when attention may cross documents).
    segments_BS (int32): which document of the sequence a token belongs to, from 1; 0 is padding.  A token attends only to
        earlier tokens of the same segment.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]

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

    def select(self, start: int, stop: int) -> Batch:
        """Rows [start, stop)."""
        return Batch(
            self.inputs[start:stop],
            self.targets[start:stop],
            self.weights[start:stop],
            self.positions[start:stop],
            self.segments[start:stop],
        )
