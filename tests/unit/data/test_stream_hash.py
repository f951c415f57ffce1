"""One digest for one stream of tokens: in a torch process, in a JAX process, over shards, and after resuming."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from jaxllm.cli.data import data
from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Shard
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, prepare
from jaxllm.data.stream_hash import combine, row_digests, shard_digests, stream_hash

MakeConfig = Callable[..., RunConfig]
BATCHES = 30


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config()


@pytest.fixture
def prepared(config: RunConfig) -> PreparedData:
    return prepare(config, progress=False)


@pytest.fixture
def run_json(config: RunConfig, prepared: PreparedData, tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(config.model_dump_json(by_alias=True))
    return path


def test_it_covers_several_epochs(prepared: PreparedData, config: RunConfig) -> None:
    """Else the tests below would say nothing about the seam between two."""
    assert BatchPipeline(prepared, config, "train").sequences < BATCHES * 8


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_combine_to_the_digest_of_the_whole(prepared: PreparedData, config: RunConfig, count: int) -> None:
    shards = [shard_digests(prepared, config, Shard(index, count), BATCHES) for index in range(count)]
    assert combine(shards) == stream_hash(prepared, config, BATCHES)


def test_resuming_at_any_step(prepared: PreparedData, config: RunConfig) -> None:
    whole = shard_digests(prepared, config, Shard(0, 1), BATCHES)
    for start in range(BATCHES):
        assert stream_hash(prepared, config, BATCHES - start, start) == combine([whole[start:]])
    assert len({stream_hash(prepared, config, 1, start) for start in range(BATCHES)}) == BATCHES


@pytest.mark.parametrize("name", ["inputs", "targets", "weights", "positions", "segments"])
def test_one_changed_value_changes_the_digest_of_its_row_alone(prepared: PreparedData, config: RunConfig, name: str) -> None:
    batch = BatchPipeline(prepared, config, "train").batch(0)
    values = getattr(batch, name).copy()
    values[3, 7] += 1
    before, after = row_digests(batch), row_digests(replace(batch, **{name: values}))
    assert [row for row in range(batch.rows) if before[row] != after[row]] == [3]


def test_the_digest_depends_on_the_order_of_rows(prepared: PreparedData, config: RunConfig) -> None:
    digests = shard_digests(prepared, config, Shard(0, 1), 2)
    assert combine([digests]) != combine([digests[::-1]])
    assert combine([digests]) != combine([[digests[0][::-1], digests[1]]])


def test_the_digest_is_that_of_the_bytes(prepared: PreparedData, config: RunConfig) -> None:
    """Written out once more, so that others can compute it."""
    import hashlib

    batch = BatchPipeline(prepared, config, "train").batch(0)
    rows = b""
    for row in range(8):
        fields = (batch.inputs, batch.targets, batch.weights, batch.positions, batch.segments)
        assert all(np.dtype(values.dtype).itemsize == 4 for values in fields)
        rows += hashlib.sha256(b"".join(values[row].tobytes() for values in fields)).digest()
    assert stream_hash(prepared, config, 1) == hashlib.sha256(rows).hexdigest()


# ------------------------------------------------------------------------------------------------------ real processes


@pytest.mark.parametrize(("world", "start"), [(2, 0), (4, 7)])
def test_torch_processes(
    prepared: PreparedData, config: RunConfig, run_json: Path, tmp_path: Path, world: int, start: int
) -> None:
    script = Path(__file__).with_name("torch_reader.py")
    arguments = [str(run_json), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments, str(rank), str(world), str(start), str(BATCHES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors
    assert outputs[0][0] == stream_hash(prepared, config, BATCHES, start)


def test_jax_process(prepared: PreparedData, config: RunConfig, run_json: Path) -> None:
    """JAX with its devices up, in float64 mode and with another default matmul precision, reads the same."""
    script = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
assert float(jax.jit(lambda x: x @ x)(jax.numpy.ones((2, 2)))[0, 0]) == 2.0
from jaxllm.config.schema import RunConfig
from jaxllm.data.prepare import prepare
from jaxllm.data.stream_hash import stream_hash
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
sys.stdout.write(stream_hash(prepare(config, progress=False), config, int(sys.argv[2])))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(run_json), str(BATCHES)], check=False, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == stream_hash(prepared, config, BATCHES)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run_file(config: RunConfig, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(config.model_dump_json(by_alias=True))
    return str(path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(data, [*arguments])


def test_hash_verb(run_file: str, prepared: PreparedData, config: RunConfig) -> None:
    expected = stream_hash(prepared, config, 5, 3)
    for processes in ("1", "2"):
        result = invoke("hash", run_file, "--batches", "5", "--start", "3", "--processes", processes)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{expected}  train batches 3 to 7, 8 sequences each\n"
    other = invoke("hash", run_file, "--batches", "5", "--start", "3", "--set", "data.sequence_length=16")
    assert other.exit_code == 0
    assert expected not in other.stdout


def test_hash_verb_of_the_validation_split(run_file: str, prepared: PreparedData, config: RunConfig) -> None:
    with BatchPipeline(prepared, config, "validation") as pipeline:
        count = pipeline.batches
    assert count is not None
    result = invoke("hash", run_file, "--split", "validation")
    assert (
        result.stdout
        == f"{stream_hash(prepared, config, count, 0, 'validation')}  validation batches 0 to {count - 1}, 8 sequences each\n"
    )
    result = invoke("hash", run_file, "--split", "validation", "--start", "1000")
    assert result.exit_code == 1
    assert result.stderr == f"error: the validation split ends after {count} batches, before batch 1000; start earlier\n"


def test_hash_verb_with_processes_that_do_not_fit(run_file: str) -> None:
    result = invoke("hash", run_file, "--processes", "3")
    assert result.exit_code == 1
    assert "8 sequences cannot be split evenly over 3 processes" in result.stderr
    assert "Traceback" not in result.output


def test_show_verb(run_file: str, prepared: PreparedData, config: RunConfig) -> None:
    with BatchPipeline(prepared, config, "train") as pipeline:
        number = next(number for number in range(20) if pipeline.batch(number).segments.max() > 1)
        sequence = pipeline.sequence_numbers(number)[1]
        batch = pipeline.batch(number)
    result = invoke("show", run_file, "--rows", "20", "--batch", str(number))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert f"{prepared.train.tokens:,}" in result.stdout
    assert f"{prepared.unigram_entropy:.4f} nats per token" in result.stdout
    assert [line for line in lines if line.startswith(f"train batch {number}, row 1: sequence {sequence} ")]
    assert len([line for line in lines if line.startswith("train batch")]) == 20
    assert len([line for line in lines if line.startswith(f"train batch {number + 2}, row ")]) == 4
    # A document that ends inside the sequence: its last token has no target and weight 0.
    row = next(row for row in range(8) if batch.segments[row].max() > 1)
    end = int(np.flatnonzero(np.diff(batch.segments[row]))[0])
    part = result.stdout.split(f"train batch {number}, row {row}:")[1].split("train batch")[0]
    assert f"── document 2: tokens {end + 1} to " in part
    table = [re.split(r"\s{2,}", line.strip()) for line in part.split("input")[1].splitlines()]
    assert [str(end), "1", str(end), "0", "'<|endoftext|>' (0)", "-"] in table
    for text in prepared.tokenizer.decode(batch.inputs[row][:end].tolist()).splitlines():
        assert text.rstrip() in part


def test_show_verb_without_rows_and_with_few(run_file: str) -> None:
    assert "train batch" not in invoke("show", run_file, "--rows", "0").stdout
    result = invoke(
        "show",
        run_file,
        "--split",
        "validation",
        "--rows",
        "99",
        "--set",
        "data.packing=none",
        "--set",
        "data.sequence_length=512",
    )
    assert result.exit_code == 0
    assert re.search(r"\n +511 +0 +0 +0 +padding +- *\n", result.stdout)


def test_prepare_verb(run_file: str, prepared: PreparedData, tmp_path: Path) -> None:
    result = invoke("prepare", run_file, "--set", f"data.cache_dir={tmp_path / 'cache'}")
    assert result.exit_code == 0
    assert prepared.fingerprint in result.stdout
    assert (tmp_path / "cache" / "data" / prepared.fingerprint / "prepared.json").is_file()


@pytest.mark.parametrize("verb", ["hash", "show", "prepare"])
def test_bad_data_is_one_sentence(run_file: str, verb: str, tmp_path: Path) -> None:
    result = invoke(verb, run_file, "--set", f"data.source={{kind: text, files: {tmp_path}/none.txt}}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: there is no file {tmp_path}/none.txt")
    assert result.stderr.count("\n") == 1
