"""Rows of the TPU benchmarks: run files, compiled for a topology one after another, each kept as soon as it is known."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._report import write
from jaxllm.config import load_run
from jaxllm.planning.tpu.study import Study, study
from jaxllm.planning.tpu.text import lines
from jaxllm.planning.tpu.topology import parse_topology

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class Row:
    """One compile.  reference: what it is compared with, as the script needs it."""

    name: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)


def run(description: str | None, rows: Sequence[Row], judge: Callable[[Row, Study], dict[str, Any]]) -> None:
    """Compile the rows that the command line names (all by default), print each, and keep results in its `--json` file.

    Rows with the same step are compiled once; the others say whose compile it was (`compiled_as`).

    judge: what to keep of a study beside its report.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[row.name for row in rows], help="compile this row only; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of every verb, after the row's own")
    parser.add_argument("--libtpu", type=Path, help="another libtpu.so than the installed one")
    parser.add_argument("--keep", type=Path, help="folder for what the compiler writes")
    parser.add_argument("--json", type=Path, help="results; rows that are there already and not compiled now stay")
    arguments = parser.parse_args()
    if arguments.libtpu is not None:
        os.environ["TPU_LIBRARY_PATH"] = str(arguments.libtpu)
    found, compiled = _earlier(arguments.json), dict[tuple[Any, ...], tuple[str, Study]]()
    for row in rows:
        if arguments.only and row.name not in arguments.only:
            continue
        step = (row.config, row.topology, row.overrides)
        if step not in compiled:
            config = load_run(CONFIGS / row.config, (*row.overrides, *arguments.set)).config
            keep = None if arguments.keep is None else arguments.keep / row.name
            compiled[step] = row.name, study(config, parse_topology(row.topology), keep=keep)
        compiled_as, result = compiled[step]
        print(f"== {row.name}" + (f", the step of {compiled_as}" if compiled_as != row.name else ""))
        print("\n".join(lines(result)), flush=True)
        judged = judge(row, result)
        print(
            "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in judged.items())
        )
        settings = {"config": row.config, "overrides": [*row.overrides, *arguments.set], "libtpu": _libtpu(arguments.libtpu)}
        settings |= {"compiled_as": compiled_as} if compiled_as != row.name else {}
        found[row.name] = {**settings, "reference": dict(row.reference), **judged, "study": result.to_json()}
        write(arguments.json, found)


def _earlier(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    earlier: dict[str, Any] = json.loads(path.read_text())["results"]
    return earlier


def _libtpu(path: Path | None) -> str:
    from importlib.metadata import distributions, version

    if path is None:
        return version("libtpu")
    for found in distributions(path=[str(path.parent.parent)]):
        if found.metadata["Name"] == "libtpu":
            return found.version
    return "unknown"
