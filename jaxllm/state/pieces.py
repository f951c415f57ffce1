"""Tensors that a checkpoint holds cut up: a mixture of experts, of which every expert is by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.state.training_state import Array, TensorReader


class JoinedReader:
    """Some tensors of `stored` as they are, others joined from pieces, of which no more is read than is asked for.

    whole: names that `stored` has.  pieces: for other names, by expert the names of the pieces that follow one another along
    the first axis of its tensor; the experts are stacked.  One row of one piece is a tensor under another name.
    """

    def __init__(self, stored: TensorReader, whole: Sequence[str], pieces: Mapping[str, tuple[tuple[str, ...], ...]]) -> None:
        self._stored = stored
        self._whole = list(whole)
        self._pieces = pieces

    def names(self) -> Sequence[str]:
        """Whole tensors first."""
        return [*self._whole, *self._pieces]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._pieces:
            return self._stored.shape(name)
        grid = self._pieces[name]
        shapes = [self._stored.shape(piece) for piece in grid[0]]
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return joined if _is_renamed(grid) else (len(grid), *joined)

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        """The tensor or a slice of it."""
        if name not in self._pieces:
            return self._stored.read(name, index)
        grid = self._pieces[name]
        if _is_renamed(grid):
            return self._stored.read(grid[0][0], index)
        experts, rows, *columns = index or (slice(None),) * len(self.shape(name))
        chosen = grid[experts]
        if not chosen:
            return self._read_row(grid[0], rows, columns)[None][:0]
        return np.stack([self._read_row(row, rows, columns) for row in chosen])

    def _read_row(self, row: Sequence[str], rows: slice, columns: Sequence[slice]) -> Array:
        """The wanted rows of one expert's tensor."""
        sizes = [self._stored.shape(piece)[0] for piece in row]
        start, stop, _ = rows.indices(sum(sizes))
        parts, before = [], 0
        for piece, size in zip(row, sizes, strict=True):
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                parts.append(self._stored.read(piece, (slice(first, last), *columns)))
            before += size
        return np.concatenate(parts) if parts else self._stored.read(row[0], (slice(0, 0), *columns))


def _is_renamed(grid: tuple[tuple[str, ...], ...]) -> bool:
    """Whether there is one piece only, under another name."""
    return len(grid) == 1 and len(grid[0]) == 1
