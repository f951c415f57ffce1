"""metrics.jsonl: one JSON object a line, each on disk when the call returns."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from jaxllm.errors import JaxllmError
from jaxllm.metrics.records import TrainRecord, ValidationRecord


class JsonlSink:
    """Appends records to a file, in which every step stands once however often the run was interrupted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def open(self, total_steps: int, start_step: int) -> None:  # noqa: ARG002
        """Start the file, or go on with it after start_step: what comes later, or was cut off, is dropped."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_after(start_step)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise JaxllmError(f"cannot write {self._path}: {error.strerror or error}; free it and resume") from None

    def train(self, record: TrainRecord) -> None:
        self._write(record.to_json())

    def validation(self, record: ValidationRecord) -> None:
        self._write(record.to_json())

    def message(self, text: str) -> None:
        """Messages are for people."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"{self._path} is not open")
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing tries to write what is left once more
                self._file.close()
            self._file = None
            raise JaxllmError(f"cannot write {self._path}: {error.strerror or error}; make room and resume the run") from None

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        kept = [json.dumps(line) + "\n" for line in parse_metrics(text) if 0 < step >= line["step"]]
        if "".join(kept) != text:
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self._path)


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order.  A line that a crash cut off is left out."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record.get("split") in ("train", "validation"):
            records.append(record)
    return records
