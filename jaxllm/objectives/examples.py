"""Random access to the rows of a split: the one thing every objective offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxllm.data.batch import Batch
from jaxllm.data.packing import Packing, Rows

Indices = NDArray[np.int64]


class Examples(Protocol):
    """The rows of a split."""

    def __len__(self) -> int:
        """Number of rows of the split."""
        ...

    def batch(self, indices_R: Indices, places_R: Indices) -> Batch:
        """The batch of rows `indices`.

        places: where these rows stand in the endless sequence of a run's rows, epoch after epoch: what an objective that draws
        anew in every epoch seeds its draws by.  A row depends on nothing but these two numbers.
        """
        ...


class RowObjective(Protocol):
    """Turns packed rows into a batch."""

    def batch(self, rows: Rows, indices_R: Indices, places_R: Indices) -> Batch:
        """The batch of these rows, in their order."""
        ...


class PackedExamples:
    """Documents in packed rows, under an objective that reads plain text."""

    def __init__(self, packing: Packing, objective: RowObjective) -> None:
        self._packing = packing
        self._objective = objective

    def __len__(self) -> int:
        return len(self._packing)

    def batch(self, indices_R: Indices, places_R: Indices) -> Batch:
        return self._objective.batch(self._packing.rows(indices_R), indices_R, places_R)
