"""causal-lm: every token is predicted from those before it in its document.

R rows, S tokens per sequence; a row holds S + 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxllm.data.batch import Batch
from jaxllm.data.packing import Rows
from jaxllm.objectives.examples import Indices


@dataclass(frozen=True)
class CausalLM:
    """Targets are the inputs shifted by one.

    The end of a document is not asked to predict the start of the next one, unless attention crosses documents: then a row
    is one text, with one segment and running positions.
    """

    cross_document_attention: bool = False
    overlap: ClassVar[int] = 1

    def batch(self, rows: Rows, indices_R: Indices | None = None, places_R: Indices | None = None) -> Batch:  # noqa: ARG002
        """Rows of S + 1 tokens -> a batch of S."""
        segments_RW, positions_RW = running(rows, self.cross_document_attention)
        inputs_RS, next_RS = rows.tokens[:, :-1], rows.tokens[:, 1:]
        segment_RS, next_segment_RS = segments_RW[:, :-1], segments_RW[:, 1:]
        known_RS = (next_segment_RS == segment_RS) & (next_segment_RS > 0)
        return Batch(
            inputs=np.ascontiguousarray(inputs_RS),
            targets=np.where(known_RS, next_RS, np.int32(0)),
            weights=known_RS.astype(np.float32),
            positions=np.ascontiguousarray(positions_RW[:, :-1]),
            segments=np.ascontiguousarray(segment_RS),
        )


def running(rows: Rows, cross_document_attention: bool) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Segments and positions of rows: as they are packed, or of one running text if attention crosses documents."""
    if not cross_document_attention:
        return rows.segments, rows.positions
    segments = np.minimum(rows.segments, 1)
    return segments, np.where(segments > 0, np.arange(segments.shape[1], dtype=np.int32), np.int32(0))
