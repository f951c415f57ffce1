"""Documents to rows of tokens, by random access: row i is computed, never stored.

    documents (shuffled)   A A A A A | B B B | C C C C C C C C C C
    sequence_length 6      row 0: A A A A A B [B]     [..]: seen only as the last target, and again as the first input of
                           row 1: B B C C C C [C]           the next row
    segments of row 0      1 1 1 1 1 2
    positions of row 0     0 1 2 3 4 0

R rows, W tokens per row (sequence_length and, for objectives that predict the next token, one more), D documents.
P pieces of documents, T tokens of all rows without padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import DataConfig
from jaxllm.data.order import permutation
from jaxllm.data.prepare import PreparedSplit
from jaxllm.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of packed documents.

    tokens_RW (int32); segments_RW (int32): which document of the row a token belongs to, from 1, or 0 for padding;
    positions_RW (int32): place within the part of the document that lies in this row, 0 for padding.  Padding is token 0.
    """

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]


class Packing(ABC):
    """Random access to the rows of a split."""

    def __init__(self, split: PreparedSplit, sequence_length: int, overlap: int) -> None:
        """overlap: tokens that a row shows beyond its sequence_length, which are the next row's first."""
        self._tokens = split.file.tokens
        self._stride = sequence_length
        self._width = sequence_length + overlap

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows of the split."""

    @abstractmethod
    def rows(self, indices_R: Indices) -> Rows:
        """These rows, in this order."""

    def _gather(self, row_P: Indices, source_P: Indices, length_P: Indices, rows: int) -> Rows:
        """Copy P pieces of documents, tokens [source, source + length), into the rows `row`, one after the other.

        The pieces are in the order of their rows; every row has at least one.
        """
        pieces_R = np.bincount(row_P, minlength=rows)
        segment_P = np.arange(row_P.size) - np.repeat(np.cumsum(pieces_R) - pieces_R, pieces_R) + 1
        start_P = np.cumsum(length_P) - length_P
        place_T = np.arange(int(length_P.sum()))
        tokens_T = self._tokens[place_T + np.repeat(source_P - start_P, length_P)]
        positions_T = place_T - np.repeat(start_P, length_P)
        lengths_R = np.bincount(row_P, weights=length_P, minlength=rows).astype(np.int64)
        return Rows(*(self._rectangle(values, lengths_R) for values in (tokens_T, np.repeat(segment_P, length_P), positions_T)))

    def _rectangle(self, values_T: NDArray[np.integer], lengths_R: Indices) -> NDArray[np.int32]:
        """Rows of these lengths, laid end to end, as an array with zeros after each."""
        if values_T.size == lengths_R.size * self._width:
            return values_T.astype(np.int32).reshape(lengths_R.size, self._width)
        values_RW = np.zeros((lengths_R.size, self._width), np.int32)
        values_RW[np.arange(self._width) < lengths_R[:, None]] = values_T
        return values_RW


class ConcatenatedPacking(Packing):
    """All documents of the split in a shuffled order, end to end, cut every sequence_length tokens.

    Only the last row can have padding.
    """

    def __init__(self, split: PreparedSplit, sequence_length: int, overlap: int, seed: int) -> None:
        super().__init__(split, sequence_length, overlap)
        offsets = split.file.offsets
        documents = split.documents[permutation(split.documents.size, seed, f"{split.name} documents")]
        documents = documents[np.diff(offsets)[documents] > 0]
        self._starts_D = offsets[:-1][documents]
        self._stream_D = np.zeros(documents.size + 1, np.int64)  # document d is [stream[d], stream[d + 1]) of the stream
        np.cumsum(np.diff(offsets)[documents], out=self._stream_D[1:])
        self._length = int(self._stream_D[-1])
        self._rows = max(0, -(-(self._length - overlap) // sequence_length))

    def __len__(self) -> int:
        return self._rows

    def rows(self, indices_R: Indices) -> Rows:
        begin_R = indices_R * self._stride
        end_R = np.minimum(begin_R + self._width, self._length)
        first_R = np.searchsorted(self._stream_D, begin_R, side="right") - 1
        last_R = np.searchsorted(self._stream_D, end_R, side="left") - 1
        pieces_R = last_R - first_R + 1
        row_P = np.repeat(np.arange(indices_R.size), pieces_R)
        document_P = first_R[row_P] + np.arange(row_P.size) - (np.cumsum(pieces_R) - pieces_R)[row_P]
        begin_P = np.maximum(self._stream_D[document_P], begin_R[row_P])
        end_P = np.minimum(self._stream_D[document_P + 1], end_R[row_P])
        source_P = self._starts_D[document_P] + begin_P - self._stream_D[document_P]
        return self._gather(row_P, source_P, end_P - begin_P, indices_R.size)


class SingleDocumentPacking(Packing):
    """One document per row, cut or padded; documents too short to predict anything are left out."""

    def __init__(self, split: PreparedSplit, sequence_length: int, overlap: int) -> None:
        super().__init__(split, sequence_length, overlap)
        lengths = np.diff(split.file.offsets)[split.documents]
        documents = split.documents[lengths > overlap]
        self._starts_D = split.file.offsets[:-1][documents]
        self._lengths_D = np.minimum(lengths[lengths > overlap], self._width)

    def __len__(self) -> int:
        return int(self._starts_D.size)

    def rows(self, indices_R: Indices) -> Rows:
        rows = indices_R.size
        return self._gather(np.arange(rows), self._starts_D[indices_R], self._lengths_D[indices_R], rows)


def create_packing(split: PreparedSplit, config: DataConfig, overlap: int, seed: int) -> Packing:
    """The packing of `data.packing`.  DataError when the split has no row."""
    packing: Packing
    if config.packing == "concatenate":
        packing = ConcatenatedPacking(split, config.sequence_length, overlap, seed)
    else:
        packing = SingleDocumentPacking(split, config.sequence_length, overlap)
    if len(packing) == 0:
        raise DataError(f"the {split.name} documents hold too few tokens for one sequence; give more text")
    return packing
