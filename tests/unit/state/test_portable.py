"""The portable form: bit for bit, sharded or not, readable by transformers' own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxllm.errors import CheckpointError
from jaxllm.state import Progress, SafetensorsReader, TrainingState, is_portable, read_state, write_safetensors, write_state
from jaxllm.state.training_state import Array


class Memory:
    """A TensorReader over a dictionary."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.tensors = tensors

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        return self.tensors[name][tuple(index) if index else ...]


def _tensors(seed: int, dtype: str = "float32") -> Memory:
    random = np.random.default_rng(seed)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 4, 2), "c.weight": (11, 1)}
    return Memory({name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_round_trip_is_bitwise(tmp_path: Path, dtype: str) -> None:
    state = TrainingState(Progress(3, 2, 12, 99), _tensors(0, dtype), _tensors(1, dtype), _tensors(2, dtype))
    write_state(state, tmp_path, {"model_type": "llama"}, dtype=dtype)
    assert is_portable(tmp_path)
    back = read_state(tmp_path)
    assert back.progress == state.progress
    assert json.loads((tmp_path / "weights/config.json").read_text()) == {"model_type": "llama", "dtype": dtype}
    for part in ("params", "exp_avg", "exp_avg_sq"):
        wanted, found = getattr(state, part), getattr(back, part)
        assert sorted(found.names()) == sorted(wanted.names())
        for name in wanted.names():
            np.testing.assert_array_equal(found.read(name), wanted.read(name), strict=True)


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_shards_hold_every_tensor_once(tmp_path: Path, limit: int) -> None:
    tensors = _tensors(0)
    write_safetensors(tensors, tmp_path, max_shard_bytes=limit)
    reader = SafetensorsReader(tmp_path)
    assert sorted(reader.names()) == sorted(tensors.names())
    for name in tensors.names():
        assert reader.shape(name) == tensors.shape(name)
        np.testing.assert_array_equal(reader.read(name), tensors.read(name), strict=True)
    part = reader.read("b.weight", (slice(1, 3), slice(0, 2), slice(1, 2)))
    np.testing.assert_array_equal(part, tensors.read("b.weight")[1:3, :2, 1:2])


def test_bfloat16_files_read_as_float32(tmp_path: Path) -> None:
    tensors = _tensors(0)
    write_safetensors(tensors, tmp_path, dtype="bfloat16")
    values = SafetensorsReader(tmp_path).read("a.weight")
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, tensors.read("a.weight"), rtol=2**-8)


def test_no_moments_before_the_first_update(tmp_path: Path) -> None:
    write_state(TrainingState(Progress(), _tensors(0)), tmp_path, {})
    back = read_state(tmp_path)
    assert back.exp_avg is None
    assert back.exp_avg_sq is None


def test_only_the_writer_touches_the_disk(tmp_path: Path) -> None:
    write_state(TrainingState(Progress(), _tensors(0)), tmp_path / "out", {}, is_writer=False)
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint in the portable form"):
        read_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        SafetensorsReader(tmp_path).names()
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsReader(tmp_path).names()
