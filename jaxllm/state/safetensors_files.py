"""Folders of safetensors files in the Hugging Face layout: one file, or shards with an index.

Read lazily, tensor by tensor or slice by slice; written shard by shard, so that no more than one shard is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16", which safetensors asks for)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.errors import CheckpointError
from jaxllm.state.training_state import Array, TensorReader

MAX_SHARD_BYTES = 2 * 2**30
_DTYPES = ("F64", "F32", "BF16", "F16")


class SafetensorsReader:
    """The tensors of a folder of safetensors files, read lazily.

    `read` gives float32, or float64 where the file holds float64.  `renamed` maps a wanted name to the name in the file.
    Raises CheckpointError when the folder holds no weights, a file is damaged, or a tensor that is asked for is quantised.
    """

    def __init__(self, folder: Path, stem: str = "model", renamed: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._stem = stem
        self._renamed = dict(renamed or {})
        self._open: tuple[str, Any] | None = None

    @cached_property
    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self._folder / f"{self._stem}.safetensors.index.json"
        single = self._folder / f"{self._stem}.safetensors"
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index} is damaged ({error}); restore it from a copy") from None
        if not single.is_file():
            raise CheckpointError(f"{self._folder} holds no {self._stem}.safetensors; only safetensors weights are read")
        return dict.fromkeys(self._handle(single.name).keys(), single.name)

    def _handle(self, file: str) -> Any:
        # One open handle: tensors are asked for in file order, and thousands of shards must not exhaust descriptors.
        if self._open is None or self._open[0] != file:
            try:
                self._open = (file, safe_open(self._folder / file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._folder / file} cannot be read ({error}); restore it from a copy") from None
        return self._open[1]

    def _slice_of(self, name: str) -> Any:
        name = self._renamed.get(name, name)
        found = self._handle(self._files[name]).get_slice(name)
        if found.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{self._folder / self._files[name]}: {name} is stored as {found.get_dtype()}; quantised weights are not "
                "supported; start from the checkpoint they were made from"
            )
        return found

    def names(self) -> Sequence[str]:
        """Names in the order of the files."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slice_of(name).get_shape())

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        """The tensor or a slice of it, as float32 or float64."""
        values = np.asarray(self._slice_of(name)[tuple(index) if index else ...])
        return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)


def _shards(reader: TensorReader, itemsize: int, limit: int) -> list[list[str]]:
    """Names grouped so that each group's tensors stay under `limit` bytes, at least one in each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in reader.names():
        size = math.prod(reader.shape(name)) * itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read(reader: TensorReader, name: str, dtype: str) -> Array:
    return np.ascontiguousarray(reader.read(name).astype(np.dtype(dtype), copy=False))


def write_safetensors(
    reader: TensorReader,
    folder: Path,
    *,
    stem: str = "model",
    dtype: str = "float32",
    is_writer: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write every tensor of `reader` below `folder`, shard by shard, as transformers does.

    dtype: float32, float64 or bfloat16.  Every process of a collective reader must call this; only `is_writer` touches the
    disk.  Raises CheckpointError when the disk is full or cannot be written.
    """
    shards = _shards(reader, np.dtype(dtype).itemsize, max_shard_bytes)
    for number, (file, names) in enumerate(_named(shards, stem)):
        tensors = {}
        for name in names:
            values = _read(reader, name, dtype)
            if is_writer:
                tensors[name] = values
        if is_writer:
            if number == 0:
                folder.mkdir(parents=True, exist_ok=True)
            _save(tensors, folder / file)
    if is_writer and len(shards) > 1:
        weight_map = {name: file for file, names in _named(shards, stem) for name in names}
        total = sum(math.prod(reader.shape(name)) for name in reader.names()) * np.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _named(shards: Sequence[Sequence[str]], stem: str) -> Iterator[tuple[str, Sequence[str]]]:
    if len(shards) == 1:
        yield f"{stem}.safetensors", shards[0]
        return
    for number, names in enumerate(shards, start=1):
        yield f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", names


def _save(tensors: Mapping[str, Array], path: Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot write {path} ({error}); free disk space or set output_dir to another disk") from None
