"""Run file -> RunConfig, and where each key of it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from jaxllm.config.document import Document, KeyPath, read_document, undotted
from jaxllm.config.messages import explain
from jaxllm.config.overrides import apply_overrides
from jaxllm.config.schema import RunConfig
from jaxllm.errors import ConfigError


@dataclass(frozen=True)
class Origins:
    """Where each key of a run came from."""

    document: Document
    overrides: Mapping[KeyPath, str]

    def locate(self, key: str) -> str:
        """`FILE:LINE` of a dotted key, `--set a.b=value` when that gave it, or the nearest section around it."""
        path = undotted(key)
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return self.overrides[path[:length]]
            if path[:length] in self.document.lines:
                return f"{self.document.source}:{self.document.lines[path[:length]]}"
        below = [said for known, said in self.overrides.items() if path and known[: len(path)] == path]
        return below[0] if below else self.document.source

    def place(self, error: ConfigError) -> ConfigError:
        """The same error, and those found with it, with their locations."""
        others = tuple(self.place(other) for other in error.others)
        return ConfigError(error.key, error.message, error.location or self.locate(error.key), others)


@dataclass(frozen=True)
class LoadedRun:
    """A run file that was read and found valid."""

    config: RunConfig
    origins: Origins

    def locate(self, key: str) -> str:
        """Where a dotted key came from: `FILE:LINE`, or the `--set` that gave it."""
        return self.origins.locate(key)

    def place(self, error: ConfigError) -> ConfigError:
        """The same error, and those found with it, with their locations."""
        return self.origins.place(error)


def load_run(path: Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Read a run file and check it against the schema.

    overrides: `a.b=value`, the value as YAML.  ConfigError, with its location and every other error of the file in `others`,
    for a file that cannot be read, is not YAML, or does not fit the schema.
    """
    origins = read_origins(path, overrides)
    # Strict JSON: a list may become a tuple and a string a path, but "3" is never 3.
    text = json.dumps(origins.document.data)
    try:
        return LoadedRun(RunConfig.model_validate_json(text, strict=True), origins)
    except ValidationError as error:
        raise origins.place(explain(error, RunConfig)) from None


def read_origins(path: Path, overrides: Sequence[str] = ()) -> Origins:
    """Read a run file without checking it, for telling where a key came from."""
    document = read_document(path)
    return Origins(document, apply_overrides(document, overrides))
