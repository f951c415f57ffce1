"""Documents of whole rows, in place of the mask that keeps them apart.  Nothing here imports torch.

Shape legend: B sequences, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from jaxllm.families import ModelSpec


@dataclass(frozen=True)
class Documents:
    """Where the documents of whole rows lie: what a mask of causal attention within documents says, without the mask.

    length: tokens of a row.  runs: of each row, the first token of every document and the token after its last; padding is a
    document like any other.
    """

    length: int
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, segments_BS: NDArray[np.int32]) -> Documents:
        """The documents of rows in which every document is one run of equal numbers."""
        length = segments_BS.shape[1]
        rows = []
        for segments_S in segments_BS:
            cuts = [0, *(np.flatnonzero(np.diff(segments_S)) + 1).tolist(), length]
            rows.append(tuple(pairwise(cuts)))
        return cls(length, tuple(rows))

    @property
    def whole(self) -> bool:
        """Whether every row is one document."""
        return all(len(runs) == 1 for runs in self.runs)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every document, row after row."""
        return [stop - start for runs in self.runs for start, stop in runs]


def goes_by_documents(spec: ModelSpec, attention: str, longest: int) -> bool:
    """Whether attention over documents of up to `longest` tokens needs no mask but `Documents`.

    So it is with torch's causal kernel in decoders, unless a layer's window is shorter than a document.
    """
    plain = all(
        each.causal and each.softcap is None and (each.window is None or longest <= each.window) for each in spec.attentions
    )
    return plain and spec.encoder is None and attention != "eager"
