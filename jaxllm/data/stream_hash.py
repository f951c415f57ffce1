"""A digest of the exact token stream: proof that two runs read the same data.

Each row of a global batch has its own digest, and the digest of the stream is taken over these in the order of the global
rows.  However many processes read the rows, the result is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, SplitName, prepare
from jaxllm.errors import ConfigError, DataError


def row_digests(batch: Batch) -> list[bytes]:
    """SHA-256 of each row: inputs, targets, weights, positions, segments and whatever else there is, as little-endian bytes."""
    digests = []
    for row in range(batch.rows):
        value = hashlib.sha256()
        for array in batch.fields().values():
            value.update(np.ascontiguousarray(array[row], dtype=array.dtype.newbyteorder("<")).tobytes())
        digests.append(value.digest())
    return digests


def shard_digests(
    prepared: PreparedData, config: RunConfig, shard: Shard, batches: int, start: int = 0, split: SplitName = "train"
) -> list[list[bytes]]:
    """Row digests of one process's rows of batches [start, start + batches), a list per batch; fewer where the split ends."""
    with BatchPipeline(prepared, config, split, shard, start) as pipeline:
        return [row_digests(batch) for batch, _ in zip(pipeline, range(batches), strict=False)]


def batches_in(prepared: PreparedData, config: RunConfig, split: SplitName, start: int, batches: int) -> int:
    """How many of batches [start, start + batches) the split has.  DataError when it is none of them."""
    with BatchPipeline(prepared, config, split) as pipeline:
        total = pipeline.batches
    if total is None:
        return batches
    if start >= total:
        raise DataError(f"the {split} split ends after {total} batches, before batch {start}; start earlier")
    return min(batches, total - start)


def combine(shards: Sequence[Sequence[Sequence[bytes]]]) -> str:
    """The digest of the stream from what `shard_digests` returned in every process, in the order of the shards."""
    value = hashlib.sha256()
    for parts in zip(*shards, strict=True):
        for part in parts:
            for digest in part:
                value.update(digest)
    return value.hexdigest()


def stream_hash(
    prepared: PreparedData,
    config: RunConfig,
    batches: int,
    start: int = 0,
    split: SplitName = "train",
    processes: int = 1,
) -> str:
    """SHA-256 (hex) of global batches [start, start + batches) of a split, read by this process or by several new ones.

    ConfigError when the global batch cannot be split over the processes.
    """
    shards = [Shard(index, processes) for index in range(processes)]
    if processes == 1:
        return combine([shard_digests(prepared, config, shards[0], batches, start, split)])
    if config.training.global_batch % processes:
        raise ConfigError(
            "training.global_batch",
            f"{config.training.global_batch} sequences cannot be split evenly over {processes} processes",
        )
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Fresh processes: this one may have threads, which a fork would leave behind locked.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        readers = [pool.submit(_read_shard, config, shard, batches, start, split) for shard in shards]
        return combine([reader.result() for reader in readers])


def _read_shard(config: RunConfig, shard: Shard, batches: int, start: int, split: SplitName) -> list[list[bytes]]:
    return shard_digests(prepare(config, progress=False), config, shard, batches, start, split)
