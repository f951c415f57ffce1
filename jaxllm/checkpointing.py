"""Saving without stopping the loop, and finding what to resume from.

Each backend saves in the form that suits it: JAX writes sharded arrays asynchronously, DeepSpeed the portable form.  Whoever
resumes reads either: the same backend directly, the other one through the portable form.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from jaxllm.backend import Backend
from jaxllm.config import changed_keys
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError
from jaxllm.families import Model
from jaxllm.state import Progress, TrainingState, is_portable, read_state
from jaxllm.state.portable import WEIGHTS
from jaxllm.state.store import Checkpoint, CheckpointStore


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must share with the run that resumes it.  config: the resolved run file; data: its fingerprint."""

    config: Mapping[str, Any]
    data: str


class Saver:
    """Saves the backend's state; the last part (waiting for the disk, checksums, renaming) happens in the background."""

    def __init__(self, backend: Backend, store: CheckpointStore, identity: Identity, tokenizer: Tokenizer) -> None:
        self._backend = backend
        self._store = store
        self._identity = identity
        self._tokenizer = tokenizer
        self._finishing: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_saved: int | None = None

    def save(self, progress: Progress) -> None:
        """Start saving the state after `progress.step` steps (collective).  Raises what the save before it failed with."""
        self.wait()
        step = progress.step
        if self._backend.is_main:
            self._store.begin(step)
        self._backend.barrier(f"checkpoint {step} begins")
        try:
            self._backend.save(self._store.saving(step), progress)
        except BaseException:
            if self._backend.is_main:
                self._store.abandon(step)
            raise
        if self._backend.is_main:
            self._finishing = threading.Thread(target=self._finish, args=(progress,), name=f"checkpoint {step}")
            self._finishing.start()
        self.last_saved = step

    def wait(self) -> None:
        """Return when the last save is whole on disk; raises what it failed with."""
        if self._finishing is None:
            self._backend.wait()
            return
        self._finishing.join()
        self._finishing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(self, progress: Progress) -> None:
        saving = self._store.saving(progress.step)
        try:
            self._backend.wait()
            if is_portable(saving):
                self._tokenizer.save(saving / WEIGHTS)
            self._store.commit(
                progress.step,
                progress=progress,
                backend=self._backend.name,
                config=self._identity.config,
                data=self._identity.data,
            )
        except OSError as error:
            self._store.abandon(progress.step)
            self._error = CheckpointError(f"cannot write {saving} ({error}); free disk space or set output_dir elsewhere")
        except BaseException as error:  # noqa: BLE001 - handed to the loop, which raises it
            self._store.abandon(progress.step)
            self._error = error


def find_checkpoint(
    store: CheckpointStore, identity: Identity, allow_changed: Sequence[str], report: Callable[[str], None]
) -> Checkpoint | None:
    """The newest whole checkpoint, refused with CheckpointError when it belongs to another run.

    allow_changed: keys or sections (`training.steps`, `optimizer`) that may differ.  report: told of damaged checkpoints.
    """
    checkpoint = store.latest(report)
    if checkpoint is None:
        if store.steps():
            raise CheckpointError(f"every checkpoint in {store.folder} is damaged; start over with --overwrite")
        return None
    changed = {
        key: values
        for key, values in changed_keys(dict(checkpoint.config), dict(identity.config)).items()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow_changed)
    }
    if changed:
        listed = ", ".join(f"{key} (was {old!r}, now {new!r})" for key, (old, new) in sorted(changed.items()))
        flags = " ".join(f"--allow-changed {key}" for key in sorted(changed))
        raise CheckpointError(f"{checkpoint.folder} was made by a different run: {listed}; to go on regardless add {flags}")
    if checkpoint.data != identity.data and "data" not in allow_changed:
        raise CheckpointError(
            f"{checkpoint.folder} was made with other data: the content of data.source or the tokenizer has changed "
            f"(fingerprint was {checkpoint.data[:12]}, now {identity.data[:12]}); to go on regardless add --allow-changed data"
        )
    return checkpoint


def open_state(folder: Path, model: Model) -> TrainingState:
    """The state in a checkpoint folder of either backend, read lazily.  Imports jax for a checkpoint that JAX wrote."""
    if is_portable(folder):
        return read_state(folder)
    from jaxllm.jax_backend.checkpoint import read_training_state

    return read_training_state(folder, model)


def portable_state(checkpoint: Checkpoint) -> TrainingState:
    """The state in a checkpoint of either backend, for a process that must not import jax.

    A checkpoint in JAX's own form is first rewritten beside the checkpoints, by a process of its own; see `drop_portable`.
    """
    if is_portable(checkpoint.folder):
        return read_state(checkpoint.folder)
    copy = _portable_copy(checkpoint)
    with FileLock(f"{copy}.lock"):
        if not is_portable(copy):
            shutil.rmtree(copy, ignore_errors=True)
            command = [sys.executable, "-m", "jaxllm.convert", str(checkpoint.folder), str(copy)]
            done = subprocess.run(
                command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                reason = (done.stderr.strip() or "no message").splitlines()[-1]
                raise CheckpointError(f"{checkpoint.folder} cannot be converted for the other backend: {reason}")
    return read_state(copy)


def drop_portable(checkpoint: Checkpoint) -> None:
    """Remove the copy that `portable_state` made, once every process has read it."""
    copy = _portable_copy(checkpoint)
    shutil.rmtree(copy, ignore_errors=True)
    Path(f"{copy}.lock").unlink(missing_ok=True)


def _portable_copy(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder.with_name(f".portable-{checkpoint.folder.name}")
