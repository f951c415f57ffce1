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


def goes_by_documents(spec: ModelSpec, attention: str, context: int) -> bool:
    """Whether a run's attention needs no mask but `Documents`: Ulysses around a fused causal kernel without windows."""
    plain = all(each.causal and each.window is None and each.softcap is None for each in spec.attentions)
    return context > 1 and plain and spec.encoder is None and attention != "eager"
