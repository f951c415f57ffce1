"""TrainingState: weights, Adam moments, step and data position, in Hugging Face names, independent of any backend.

Tensors are read lazily, leaf by leaf, so that a state larger than memory can move from one place to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class TensorReader(Protocol):
    """A named collection of tensors that are read one at a time.

    A reader over a running multi-process backend is collective: every process reads the same names in the same order, each
    gets the whole tensor (or the slice it asks for).
    """

    def names(self) -> Sequence[str]:
        """Hugging Face names, in checkpoint order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; KeyError if there is none of that name."""
        ...

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        """The tensor, or the slice `index` of it, as numpy (fp32, or fp64 for an fp64 run)."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    step: batches consumed; batch `step` is the next one.  updates: optimiser updates applied (fewer than `step` when steps
    were skipped for a non-finite loss).  samples, tokens: sequences and target tokens consumed.
    """

    step: int = 0
    updates: int = 0
    samples: int = 0
    tokens: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Progress:
        return Progress(**{key: int(value) for key, value in data.items()})


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on, on either backend.

    params: masters.  exp_avg, exp_avg_sq: AdamW's first and second moments under the same names and shapes; both None before
    the first update (they are zero).
    """

    progress: Progress
    params: TensorReader
    exp_avg: TensorReader | None = None
    exp_avg_sq: TensorReader | None = None
