"""Batches by number: batch i is a function of the run file and the data alone.

Not of backend, mesh, process count or how often the run was stopped: a run's place in the data is one integer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.data.order import derived_seed, shuffled
from jaxllm.data.prepare import PreparedData, SplitName
from jaxllm.errors import ConfigError
from jaxllm.objectives import open_examples

WHOLE = Shard(0, 1)
_THREADS = 2  # more only compete for the interpreter lock


class BatchPipeline(Iterator[Batch]):
    """This process's rows of the global batches of one split, from number `start` on.

    train: endless; a new global permutation of the sequences every epoch, one epoch after the other without a gap, so that a
    batch may hold the end of one and the start of the next.  validation: once through, in the packing's own order, limited
    to `evaluation.batches`; rows of weight 0 fill the last batch.

    Iterating reads `data.prefetch` batches ahead on threads; call `close`, or use it in a `with`, to end them.
    """

    def __init__(
        self, prepared: PreparedData, config: RunConfig, split: SplitName, shard: Shard = WHOLE, start: int = 0
    ) -> None:
        """ConfigError when the global batch cannot be split over the shards; DataError when the split has no sequence."""
        import grain

        self._global_batch = config.training.global_batch
        if self._global_batch % shard.count:
            raise ConfigError(
                "training.global_batch",
                f"{self._global_batch} sequences cannot be split evenly over the {shard.count} processes that read them",
            )
        self._examples = open_examples(prepared, config, split)
        local = self._global_batch // shard.count
        self._local_rows = range(shard.index * local, (shard.index + 1) * local)
        self._seed = derived_seed(config.seed, "sequences")
        self._count: int | None = None
        if split != "train":
            whole = -(-len(self._examples) // self._global_batch)
            self._count = min(whole, config.evaluation.batches or whole)
        self._dataset = grain.MapDataset.range(sys.maxsize if self._count is None else self._count).map(self._read)
        self._options = grain.ReadOptions(
            num_threads=min(_THREADS, config.data.prefetch), prefetch_buffer_size=config.data.prefetch
        )
        self._iterator: Any = None
        self._next = start

    @property
    def sequences(self) -> int:
        """Sequences of the split over all processes; for training, those of one epoch."""
        return len(self._examples)

    @property
    def batches(self) -> int | None:
        """Number of batches; None for training, which does not end."""
        return self._count

    @property
    def position(self) -> int:
        """Number of the batch that iterating returns next."""
        return self._next

    def batch(self, number: int) -> Batch:
        """This process's rows of one global batch.  IndexError outside the split."""
        if number < 0 or (self._count is not None and number >= self._count):
            raise IndexError(f"batch {number} of {self._count}")
        return self._read(number)

    def sequence_numbers(self, number: int) -> NDArray[np.int64]:
        """Which sequences of the split this process's rows of a global batch are; -1 for rows that fill it up."""
        first = number * self._global_batch
        places = first + np.asarray(self._local_rows, np.int64)
        if self._count is None:
            return shuffled(places, self.sequences, self._seed)
        return np.where(places < self.sequences, places, -1)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._dataset.to_iter_dataset(self._options))
            self._iterator.set_state({"next_index": self._next})
        batch: Batch = next(self._iterator)
        self._next += 1
        return batch

    def close(self) -> None:
        """End the prefetching threads; the pipeline can be iterated again, and goes on where it was."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self, number: int) -> Batch:
        sequences = self.sequence_numbers(number)
        present = sequences[sequences >= 0]
        first = number * self._global_batch + self._local_rows.start
        batch = self._examples.batch(present, first + np.arange(present.size))
        missing = sequences.size - present.size
        return _fill(batch, missing) if missing else batch


def _fill(batch: Batch, rows: int) -> Batch:
    """The batch with `rows` more rows of padding at its end, none of which counts."""
    return batch.map(lambda array: np.pad(array, ((0, rows), (0, 0))))
