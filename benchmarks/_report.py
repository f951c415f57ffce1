"""What every benchmark writes: its results with the machine, the versions and the date they were measured on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxllm import __version__
from jaxllm.metrics.environment import describe_machine, git_state, package_versions

RESULTS = Path(__file__).parent / "results"


def write(path: str | Path | None, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write `results` to `path` (nothing is written when it is None) and return the whole report."""
    machine = describe_machine()
    del machine["hostname"]
    report = {
        "benchmark": _name(Path(sys.argv[0])),
        "date": today(),
        "machine": machine,
        "versions": {"jaxllm": __version__, "python": sys.version.split()[0], **package_versions()},
        "git": commit(),
        "results": dict(results),
    }
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
    return report


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def commit() -> dict[str, Any] | None:
    """What of the repository is measured."""
    return git_state(Path(__file__).parent)


def _name(script: Path) -> str:
    """Of a script, or of the package that it is the command of."""
    return script.parent.name if script.stem == "__main__" else script.stem
