"""Examples of one or two texts as padded rows, with what the tokenizer puts around them.

R rows, S tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxllm.data.prepare import PreparedSplit
from jaxllm.data.template import Template
from jaxllm.data.token_file import TokenFile
from jaxllm.errors import DataError
from jaxllm.objectives.examples import Indices


@dataclass(frozen=True)
class TextRows:
    """One example in a row: tokens_RS (0 for padding), token_types_RS, and lengths_R, all int32.

    inside_RS: where in its first text a token stands, or -1 for any other token.
    """

    tokens: NDArray[np.int32]
    token_types: NDArray[np.int32]
    lengths: NDArray[np.int32]
    inside: NDArray[np.int32]

    @property
    def segments(self) -> NDArray[np.int32]:
        """1 for the tokens of an example, 0 for padding."""
        return (np.arange(self.tokens.shape[1]) < self.lengths[:, None]).astype(np.int32)

    @property
    def positions(self) -> NDArray[np.int32]:
        """From 0 in every row; 0 for padding."""
        return np.arange(self.tokens.shape[1], dtype=np.int32) * self.segments


class Texts:
    """Rows of a split's examples.  second: column of the second text, if examples have one."""

    def __init__(
        self, split: PreparedSplit, template: Template, length: int, *, column: str = "tokens", second: str | None
    ) -> None:
        self._split = split
        self._template = template
        self._length = length
        self._first = _column(split, column)
        self._second = None if second is None else _column(split, second)

    def check_lengths(self, what: str, key: str) -> None:
        """DataError that names the first example that is longer than a row.  what: is too long; key: the limit."""
        sizes = self._template.size + np.diff(self._first.offsets)[self._split.documents]
        if self._second is not None:
            sizes = sizes + np.diff(self._second.offsets)[self._split.documents]
        (too_long,) = np.nonzero(sizes > self._length)
        if too_long.size:
            first = too_long[0]
            more = f" (and {too_long.size - 1:,} more)" if too_long.size > 1 else ""
            raise DataError(
                f"{origin(self._split, first)}{more}: the {what} has {sizes[first]} tokens, special tokens included, but {key} "
                f"is {self._length}; shorten it, raise {key}, or cut it with data.truncate: true"
            )

    def rows(self, indices_R: Indices) -> TextRows:
        """The examples with these numbers, cut where they are too long."""
        shape = (indices_R.size, self._length)
        rows = TextRows(
            np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape[0], np.int32), np.full(shape, -1, np.int32)
        )
        for row, number in enumerate(self._split.documents[indices_R].tolist()):
            texts = self._first.document(number), None if self._second is None else self._second.document(number)
            first, second = _cut(*texts, self._length - self._template.size)
            tokens, types = self._template.apply(first.tolist(), None if second is None else second.tolist())
            rows.tokens[row, : len(tokens)] = tokens
            rows.token_types[row, : len(types)] = types
            rows.lengths[row] = len(tokens)
            begin = len(self._template.before)
            rows.inside[row, begin : begin + first.size] = np.arange(first.size)
        return rows


def origin(split: PreparedSplit, number: int) -> str:
    """Where the example with this number in a split came from."""
    return bytes(_column(split, "origins").document(int(split.documents[number]))).decode()


def _column(split: PreparedSplit, name: str) -> TokenFile:
    return split.file if name == "tokens" else split.columns[name]


def _cut(
    first: NDArray[np.generic], second: NDArray[np.generic] | None, room: int
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Both texts cut to `room` tokens together, at the end, the longer one first."""
    if second is None:
        return first[:room], None
    over = max(first.size + second.size - room, 0)
    of_longer = min(over, abs(first.size - second.size))
    half, odd = divmod(over - of_longer, 2)
    from_first = half + odd + (of_longer if first.size > second.size else 0)
    from_second = half + (of_longer if second.size >= first.size else 0)
    return first[: first.size - from_first], second[: second.size - from_second]
