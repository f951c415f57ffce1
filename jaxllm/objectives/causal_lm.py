"""causal-lm: every token is predicted from those before it in its document.

R rows, S tokens per sequence; a row holds S + 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.data.packing import Rows


@dataclass(frozen=True)
class CausalLM:
    """Targets are the inputs shifted by one.

    The end of a document is not asked to predict the start of the next one, unless attention crosses documents: then a row
    is one text, with one segment and running positions.
    """

    cross_document_attention: bool = False
    overlap: ClassVar[int] = 1

    def batch(self, rows: Rows) -> Batch:
        """Rows of S + 1 tokens -> a batch of S."""
        segments = np.minimum(rows.segments, 1) if self.cross_document_attention else rows.segments
        inputs_RS, next_RS = rows.tokens[:, :-1], rows.tokens[:, 1:]
        segment_RS, next_segment_RS = segments[:, :-1], segments[:, 1:]
        known_RS = (next_segment_RS == segment_RS) & (next_segment_RS > 0)
        positions_RS = rows.positions[:, :-1]
        if self.cross_document_attention:
            positions_RS = np.where(segment_RS > 0, np.arange(inputs_RS.shape[1], dtype=np.int32), np.int32(0))
        return Batch(
            inputs=np.ascontiguousarray(inputs_RS),
            targets=np.where(known_RS, next_RS, np.int32(0)),
            weights=known_RS.astype(np.float32),
            positions=np.ascontiguousarray(positions_RS),
            segments=np.ascontiguousarray(segment_RS),
        )
