"""Batch i is a function of the run file and the data, whoever reads it and from wherever on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import MISSING, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, prepare
from jaxllm.errors import ConfigError

MakeConfig = Callable[..., RunConfig]
FIELDS = [field.name for field in fields(Batch) if field.default is MISSING]


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config()


@pytest.fixture
def prepared(config: RunConfig) -> PreparedData:
    return prepare(config, progress=False)


def stacked(batches: list[Batch]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS}


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    first, second = stacked(one), stacked(other)
    for name in FIELDS:
        assert np.array_equal(first[name], second[name]), name


def read(prepared: PreparedData, config: RunConfig, count: int, **keys: Any) -> list[Batch]:
    with BatchPipeline(prepared, config, keys.pop("split", "train"), **keys) as pipeline:
        return list(islice(pipeline, count))


# ------------------------------------------------------------------------------------------------------------ training


def test_every_sequence_comes_once_an_epoch_and_in_another_order_the_next(prepared: PreparedData, config: RunConfig) -> None:
    with BatchPipeline(prepared, config, "train") as pipeline:
        size = pipeline.sequences
        numbers = np.concatenate([pipeline.sequence_numbers(number) for number in range(3 * size // 8 + 1)])
        assert pipeline.batches is None
    assert size % 8  # so that a batch holds the end of one epoch and the start of the next
    epochs = [(numbers[epoch * size : (epoch + 1) * size] % size).tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
        assert epoch != list(range(size))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_a_matter_of_the_seed(prepared: PreparedData, make_config: MakeConfig) -> None:
    """Not one epoch of a neighbouring seed, which adding seed and epoch would give."""

    def order(seed: int, count: int) -> list[int]:
        with BatchPipeline(prepared, make_config({"seed": seed}), "train") as pipeline:
            numbers = [number for batch in range(count) for number in pipeline.sequence_numbers(batch).tolist()]
            return [number % pipeline.sequences for number in numbers]

    size = BatchPipeline(prepared, make_config(), "train").sequences
    two_epochs = order(0, 2 * size // 8)
    assert order(0, 4) == two_epochs[:32]
    assert order(1, 4) not in (two_epochs[:32], two_epochs[size : size + 32])
    assert order(2**40, 4) != two_epochs[:32]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_shards_together_are_the_global_batch(prepared: PreparedData, config: RunConfig, count: int) -> None:
    for split in ("train", "validation"):
        whole = read(prepared, config, 3, split=split)
        parts = [read(prepared, config, 3, split=split, shard=Shard(index, count)) for index in range(count)]
        for number, batch in enumerate(whole):
            assert_same([batch], [part[number] for part in parts])
        assert parts[0][0].rows == 8 // count


def test_resuming_at_any_step_continues_the_stream(prepared: PreparedData, config: RunConfig) -> None:
    whole = read(prepared, config, 12)
    for start in range(12):
        assert_same(read(prepared, config, 12 - start, start=start), whole[start:])
    with BatchPipeline(prepared, config, "train", start=5) as pipeline:
        assert pipeline.position == 5
        next(pipeline)
        assert pipeline.position == 6
        assert_same([pipeline.batch(2)], [whole[2]])  # random access does not move it
        assert_same([next(pipeline)], [whole[6]])


def test_prefetching_changes_nothing(prepared: PreparedData, make_config: MakeConfig) -> None:
    expected = read(prepared, make_config(prefetch=0), 20)
    for prefetch in (1, 2, 7):
        assert_same(read(prepared, make_config(prefetch=prefetch), 20), expected)


def test_a_step_far_ahead_is_reached_at_once(prepared: PreparedData, config: RunConfig) -> None:
    assert_same(read(prepared, config, 1, start=10**9), [BatchPipeline(prepared, config, "train").batch(10**9)])


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("packing", ["concatenate", "none"])
def test_validation_is_read_once_in_order_and_filled_up(prepared: PreparedData, make_config: MakeConfig, packing: str) -> None:
    config = make_config(packing=packing)
    with BatchPipeline(prepared, config, "validation") as pipeline:
        batches = list(pipeline)
        size = pipeline.sequences
        assert pipeline.batches == len(batches) == -(-size // 8)
        numbers = np.concatenate([pipeline.sequence_numbers(number) for number in range(len(batches))])
        with pytest.raises(IndexError):
            pipeline.batch(len(batches))
    assert size % 8
    assert numbers.tolist() == [*range(size), *[-1] * (len(numbers) - size)]
    everything = stacked(batches)
    for name in FIELDS:
        assert not everything[name][size:].any(), name
    if packing == "concatenate":
        documents = prepared.validation.documents.size
        assert everything["weights"].sum() <= prepared.validation.tokens - documents
        # A sequence's first token is nobody's target only if a document starts there.
        assert everything["weights"].sum() >= prepared.validation.tokens - documents - size


def test_validation_is_limited_to_the_batches_asked_for(prepared: PreparedData, make_config: MakeConfig) -> None:
    everything = read(prepared, make_config(), 100, split="validation")
    some = read(prepared, make_config({"evaluation": {"batches": 2}}), 100, split="validation")
    assert len(some) == 2 < len(everything)
    assert_same(some, everything[:2])
    assert len(read(prepared, make_config({"evaluation": {"batches": 99}}), 100, split="validation")) == len(everything)


def test_more_processes_than_sequences(prepared: PreparedData, make_config: MakeConfig) -> None:
    config = make_config({"training": {"steps": 1, "global_batch": 4096}})
    last = BatchPipeline(prepared, config, "validation", Shard(4095, 4096)).batch(0)
    assert last.rows == 1
    assert last.sequence_length == 32
    assert last.target_tokens == 0


# ----------------------------------------------------------------------------------------------------------- behaviour


def test_a_global_batch_that_cannot_be_split(prepared: PreparedData, config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="8 sequences cannot be split evenly over the 3 processes") as caught:
        BatchPipeline(prepared, config, "train", Shard(0, 3))
    assert caught.value.key == "training.global_batch"


def test_closing_ends_the_threads_and_iterating_goes_on(prepared: PreparedData, config: RunConfig) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    whole = read(prepared, config, 6)
    pipeline = BatchPipeline(prepared, config, "train")
    first = [next(pipeline) for _ in range(3)]
    assert threads()
    pipeline.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(10)
    assert not threads()
    assert_same([*first, *(next(pipeline) for _ in range(3))], whole)
    pipeline.close()
    pipeline.close()


SCRIPT = """
import sys
from pathlib import Path
from jaxllm.config.schema import RunConfig
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import prepare
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
pipeline = BatchPipeline(prepare(config, progress=False), config, "train")
next(pipeline)
"""


@pytest.mark.parametrize("ending", ["", "raise KeyboardInterrupt", "sys.exit(0)", "global_reference = pipeline"])
def test_a_process_ends_without_closing_the_pipeline(config: RunConfig, tmp_path: Path, ending: str) -> None:
    (tmp_path / "run.json").write_text(config.model_dump_json(by_alias=True))
    command = [sys.executable, "-c", SCRIPT + ending, str(tmp_path / "run.json")]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if ending.startswith("raise"):
        assert run.returncode != 0
        assert "KeyboardInterrupt" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""


def test_reading_starts_no_accelerator(config: RunConfig, tmp_path: Path) -> None:
    """Grain imports JAX, which must stay without devices: a torch process owns them."""
    (tmp_path / "run.json").write_text(config.model_dump_json(by_alias=True))
    check = "from jax._src import xla_bridge; sys.exit(str(xla_bridge._backends) if xla_bridge._backends else 0)"
    command = [sys.executable, "-c", SCRIPT + "pipeline.close()\n" + check, str(tmp_path / "run.json")]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
