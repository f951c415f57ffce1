"""Tokens of many documents end to end in one flat .npy file, with the documents' offsets beside it.

T tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

Tokens: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.float32] | NDArray[np.uint8]

NO_LABEL = -1.0
"""In the labels of a word-labelled example: a token that is not the first of its word."""

COLUMNS: Mapping[str, type[np.generic] | None] = {
    "tokens": None,
    "second": None,
    "labels": np.float32,
    "origins": np.uint8,
    "references": np.uint8,
}
"""What is kept of each document, and in which type; None: the smallest that holds a token.  Plain texts have only tokens."""

_TOKENS = "tokens.npy"
_OFFSETS = "offsets.npy"


def column_folder(name: str, column: str) -> str:
    """The folder of one column of the documents `name`."""
    return name if column == "tokens" else f"{name}_{column}"


def token_dtype(vocab_size: int) -> DTypeLike:
    """The smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


@dataclass(frozen=True)
class TokenFile:
    """tokens_T (memory-mapped); offsets (int64, D + 1): document d is tokens[offsets[d] : offsets[d + 1]].

    Tokens are uint16 or uint32.  Labels (float32) and origins (uint8: text as UTF-8) of examples are kept in the same form.
    """

    tokens: Tokens
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> TokenFile:
        """Map the files that `TokenWriter` wrote to a folder."""
        tokens = np.load(folder / _TOKENS, mmap_mode="r", allow_pickle=False)
        return cls(tokens, np.load(folder / _OFFSETS, allow_pickle=False))

    def document(self, number: int) -> Tokens:
        """The tokens of one document."""
        part: Tokens = self.tokens[self.offsets[number] : self.offsets[number + 1]]
        return part


class TokenWriter:
    """Appends documents to a token file of a length that nobody knows yet."""

    def __init__(self, folder: Path, vocab_size: int, dtype: DTypeLike | None = None) -> None:
        """dtype: of what is written; default, the smallest that holds vocab_size tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = np.dtype(token_dtype(vocab_size) if dtype is None else dtype)
        self._lengths: list[NDArray[np.int64]] = []
        self._file: BinaryIO = (folder / _TOKENS).open("wb")
        self._count = 0
        self._start = self._write_header()

    def append(self, tokens_T: NDArray[np.generic], lengths_D: NDArray[np.integer]) -> None:
        """More documents, end to end; their lengths sum to the number of tokens."""
        self._file.write(np.ascontiguousarray(tokens_T, dtype=self._dtype).data)
        self._lengths.append(lengths_D.astype(np.int64))
        self._count += tokens_T.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                if self._write_header() != self._start:
                    raise AssertionError("numpy no longer leaves room for the length in the header of a growing .npy file")
        if kind is None:
            lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
            np.save(self._folder / _OFFSETS, np.cumsum(lengths), allow_pickle=False)

    def _write_header(self) -> int:
        # numpy pads the header so that the first axis can grow in place.
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._count,)}
        npy.write_array_header_1_0(self._file, header)
        return self._file.tell()
