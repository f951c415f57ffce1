"""Write the tables of docs/tpu_compile.md that benchmarks have measured, from benchmarks/results.

python docs/generate_tpu_tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("tpu_compile.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

Rows = Mapping[str, Mapping[str, Any]]


def page() -> str:
    """The whole page; what is between a table's marks is written anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in _TABLES.items():
        begin, end = f"<!-- {name}.json: docs/generate_tpu_tables.py writes this table -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        rows = _rows(name)
        text = "\n".join([before + begin, *(table(rows) if rows else ["(Not compiled yet.)"]), "", end]) + after
    return text


def _rows(name: str) -> Rows:
    path = RESULTS / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    return {key: row for key, row in results.items() if isinstance(row, dict) and "study" in row}


def _full_size(rows: Rows) -> Iterator[str]:
    yield (
        "| run file, slice, mesh | libtpu | HBM of the chip's | predicted tokens/s/chip, MFU "
        "| products counted against the formula | to compile, seconds of the processor |"
    )
    yield "|---|---|---|---|---|---|"
    for row in rows.values():
        study, prediction = row["study"], row["study"]["prediction"]
        seconds = row.get("processor_seconds")
        yield _line(
            f"`{row['config']}`, {study['topology']}, {_mesh(study)}",
            row["libtpu"],
            f"{_gib(study['needed_bytes'])} of {_gib(study['capacity_bytes'])} GiB",
            f"{prediction['tokens_per_second_per_chip']:,.0f}, {prediction['mfu']:.1%}",
            f"{prediction['counted'] - 1:+.2%}",
            "" if seconds is None else f"{seconds:.0f}",
        )


def _maxtext(rows: Rows) -> Iterator[str]:
    yield "| row | Mcycles, ratio | matmul / other fusions / copies, MaxText's | HBM, ratio | predicted tokens/s/chip |"
    yield "|---|---|---|---|---|"
    for name, row in rows.items():
        reference = row["reference"]
        ours = " / ".join(f"{row[f'{kind}_mcycles']:,.0f}" for kind in ("matmul", "fusion", "copy"))
        theirs = " / ".join(f"{reference[kind]:,.0f}" for kind in ("matmul", "fusions", "copies"))
        yield _line(
            f"`{name}`: {_work(row['study'])}",
            f"{row['mcycles']:,.0f}, {row['cycles_ratio']:.3f}",
            f"{ours}, {theirs}",
            f"{row['hbm_gib']:.1f} GiB, {row['hbm_ratio']:.3f}",
            f"{row['study']['prediction']['tokens_per_second_per_chip']:,.0f}",
        )


def _published(rows: Rows) -> Iterator[str]:
    yield "| run | published tokens/s/chip | predicted, ratio | HBM of the chip's |"
    yield "|---|---|---|---|"
    for name, row in rows.items():
        study = row["study"]
        yield _line(
            f"`{name}`: {_mesh(study)}, {_work(study)}" if study["fits"] else f"`{name}`: {_asked(row)}",
            f"{row['published']:,}",
            f"{row['predicted']:,.0f}, {row['ratio']:.2f}" if study["fits"] else "does not fit",
            _needed(study),
        )


_SETTINGS = ("parallel.", "training.", "jax.")

_TABLES: Mapping[str, Callable[[Rows], Iterator[str]]] = {
    "tpu_full_size": _full_size,
    "tpu_maxtext": _maxtext,
    "tpu_published": _published,
}


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _needed(study: Mapping[str, Any]) -> str:
    """What a device needs of what it has; the compiler does not always say how much is too much."""
    needed = "more" if study["needed_bytes"] is None else _gib(study["needed_bytes"])
    return f"{needed} {'of' if needed != 'more' else 'than'} {_gib(study['capacity_bytes'])} GiB"


def _asked(row: Mapping[str, Any]) -> str:
    """The settings of a step that was not compiled to the end."""
    asked = ", ".join(f"`{each}`" for each in row["overrides"] if each.startswith(_SETTINGS))
    return f"{row['study']['chips']} chips, {asked}"


def _mesh(study: Mapping[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in study["mesh"].items() if size > 1)


def _work(study: Mapping[str, Any]) -> str:
    """What one device has in a step."""
    rows = study["micro_batch"] * study["accumulation"]
    return f"{study['chips']} chips, {rows} x {study['sequence_length']:,} tokens on each device of `fsdp`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
