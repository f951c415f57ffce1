"""What verbs that measure write: JSON reports, whose files are checked before anything is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_writable(*files: Path | None) -> None:
    """JaxllmError now, and not after an hour, when a report cannot be written."""
    from jaxllm.errors import JaxllmError

    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise JaxllmError(f"cannot write {file}: it is a folder, or the folder it is in is missing or not writable")


def write_json(file: Path | None, content: Mapping[str, Any]) -> None:
    """Write a report; nothing is written when there is no file."""
    if file is not None:
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
