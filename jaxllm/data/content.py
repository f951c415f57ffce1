"""What identifies data by its content: digests of files, remembered as long as a file is untouched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from jaxllm.config.source import HuggingFaceSource, Source
from jaxllm.data.sources import load_huggingface, source_files
from jaxllm.data.tokenizer import tokenizer_files
from jaxllm.errors import DataError

# A file changed twice within the resolution of its time stamp looks untouched, so young files are not remembered
# (the same trap, and the same way out, as git's index).
_SETTLED_SECONDS = 2.0


class FileDigests:
    """SHA-256 of files, remembered in one JSON file by size, times and inode, so that only changed files are read again."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[object]] = {}
        self._changed = False
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass  # missing or cut off: everything is read again

    def digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, in hex.  DataError when it cannot be read."""
        name = str(path.absolute())
        try:
            status = path.stat()
            stamp: list[object] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            known = self._known.get(name)
            if known is not None and known[:-1] == stamp:
                return str(known[-1])
            with path.open("rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
            self._known[name] = [*stamp, value]
            self._changed = True
        return value

    def save(self) -> None:
        """Remember what was read; of several processes the last one wins, and a lost entry is only read again."""
        if not self._changed:
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._memory.with_name(f"{self._memory.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._known), encoding="utf-8")
        temporary.replace(self._memory)
        self._changed = False


def source_digest(source: Source, digests: FileDigests) -> str:
    """Identifies what a source holds: the contents of its files in order; of a hub dataset, its fingerprint or revision."""
    if isinstance(source, HuggingFaceSource):
        folder = Path(source.name).expanduser()
        if not folder.is_dir():
            return _hub_digest(source)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return _joined(f"{path.relative_to(folder).as_posix()} {digests.digest(path)}" for path in files)
    return _joined(digests.digest(path) for path in source_files(source))


def tokenizer_digest(name: str, digests: FileDigests) -> str:
    """Identifies a tokenizer by the contents of its files."""
    return _joined(f"{file} {digests.digest(path)}" for file, path in tokenizer_files(name).items())


def _joined(parts: Iterable[str]) -> str:
    value = hashlib.sha256()
    for part in parts:
        value.update(f"{part}\n".encode())
    return value.hexdigest()


def _hub_digest(source: HuggingFaceSource) -> str:
    if not source.streaming:
        # Made by `datasets` from the builder, its settings and the etags of its files; known offline once downloaded.
        return str(load_huggingface(source)._fingerprint)  # noqa: SLF001 - `datasets` shows it nowhere else
    if source.revision is not None and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision  # a commit: nothing to ask the hub for, which may be out of reach
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.name, revision=source.revision).sha)
    except Exception as error:  # noqa: BLE001 - network, permission, name: the hub says which
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot find the revision of the dataset {source.name} on the hub: {reason}; where the hub is out of reach, give "
            "the commit itself as revision"
        ) from None
