"""The checkpoints of a run on disk: written under a temporary name, checksummed, renamed when whole.

    checkpoints/step-00000100/   what the backend wrote, plus
        checkpoint.json          step, progress, backend, format, and the config the run was started with
        manifest.json            size and SHA-256 of every file; written last
    checkpoints/.saving-...      being written; never read, removed by the next save

A folder without a manifest that matches its files is damaged: it is named, never used, and the one before it is taken.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.errors import CheckpointError
from jaxllm.state.training_state import Progress

_NAME = re.compile(r"step-(\d{8,})$")
_ABANDON_TRIES, _QUIET_TRIES, _ABANDON_SECONDS = 100, 10, 0.05
_DESCRIPTION, _MANIFEST = "checkpoint.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.  backend: which one wrote it, and so in which form the files are.

    config: the resolved run file it was written under.  data: fingerprint of the prepared data.
    """

    folder: Path
    progress: Progress
    backend: str
    config: Mapping[str, Any]
    data: str

    @property
    def step(self) -> int:
        return self.progress.step


class CheckpointStore:
    """The checkpoints below one folder.  keep: the newest N stay (None: all); keep_every: so do multiples of this step."""

    def __init__(self, folder: Path, keep: int | None = None, keep_every: int | None = None) -> None:
        self.folder = folder
        self._keep = keep
        self._keep_every = keep_every

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into; leftovers of interrupted saves are removed."""
        for leftover in [*self.folder.glob(".saving-*"), *self.folder.glob(".removing-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        path = self.saving(step)
        with _disk_errors(path):
            path.mkdir(parents=True)
        return path

    def saving(self, step: int) -> Path:
        """The temporary name of the checkpoint of `step`."""
        return self.folder / f".saving-{step:08d}"

    def commit(self, step: int, *, progress: Progress, backend: str, config: Mapping[str, Any], data: str) -> Checkpoint:
        """Describe, checksum and rename what was written since `begin`, then remove what need not be kept."""
        saving, final = self.saving(step), self.folder / f"step-{step:08d}"
        description = {"progress": progress.to_json(), "backend": backend, "data": data, "config": config}
        with _disk_errors(saving):
            _write_durably(saving / _DESCRIPTION, json.dumps(description, indent=2))
            _write_durably(saving / _MANIFEST, json.dumps(_checksums(saving), indent=2))
            if final.exists():
                self._remove(final)
            saving.rename(final)
            _sync_folder(self.folder)
        self._prune()
        return Checkpoint(final, progress, backend, config, data)

    def abandon(self, step: int) -> None:
        """Remove what was written since `begin`.

        Threads of a writer that failed may go on creating files for a moment, so this waits until none has for a while.
        """
        quiet = 0
        for _ in range(_ABANDON_TRIES):
            if self.saving(step).exists():
                self._remove(self.saving(step))
                quiet = 0
            if (quiet := quiet + 1) > _QUIET_TRIES:
                return
            time.sleep(_ABANDON_SECONDS)

    def steps(self) -> list[int]:
        """Steps of the checkpoints here, oldest first, damaged ones included."""
        found = (_NAME.match(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of `step`; CheckpointError naming the file when it is missing or damaged."""
        folder = self.folder / f"step-{step:08d}"
        _verify(folder)
        description = json.loads((folder / _DESCRIPTION).read_text())
        return Checkpoint(
            folder=folder,
            progress=Progress.from_json(description["progress"]),
            backend=description["backend"],
            config=description["config"],
            data=description["data"],
        )

    def latest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are named through `report` and passed over."""
        for step in reversed(self.steps()):
            try:
                return self.open(step)
            except CheckpointError as error:
                report(f"{error}; using the checkpoint before it")
        return None

    def _prune(self) -> None:
        if self._keep is None:
            return
        for step in self.steps()[: -self._keep]:
            if self._keep_every is None or step % self._keep_every:
                self._remove(self.folder / f"step-{step:08d}")

    def _remove(self, folder: Path) -> None:
        # Renamed first: a kill in the middle must not leave something that looks like a checkpoint, nor may a writer that has
        # not noticed yet go on writing into it.
        doomed = folder.with_name(f".removing-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class _disk_errors:  # noqa: N801 (used as a with statement)
    """Turns an OSError into a CheckpointError that names the folder and the reason."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "free disk space" if full else "make it writable"
            raise CheckpointError(f"cannot write {self._path} ({error.strerror}); {what} or set output_dir elsewhere") from None


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    table = {}
    for path in _files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        table[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return table


def _verify(folder: Path) -> None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: no readable {_MANIFEST} ({error})") from None
    for name, wanted in manifest.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        if path.stat().st_size != wanted["bytes"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                raise CheckpointError(f"checkpoint {folder} is damaged: the checksum of {name} does not match")


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
