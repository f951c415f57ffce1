"""Steps that other benchmarks have compiled, from their results: the largest take the TPU compiler many minutes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._report import RESULTS

_FILES = ("tpu_full_size", "tpu_maxtext", "tpu_published")
_CONFIGS = Path(__file__).parents[2] / "configs"


def compiled_rows() -> Iterator[dict[str, Any]]:
    """What is predicted now against what the compiler needed then, of every row that says how it was compiled."""
    for file in _FILES:
        path = RESULTS / f"{file}.json"
        results = json.loads(path.read_text())["results"] if path.exists() else {}
        for name, row in results.items():
            if isinstance(row, dict) and (_CONFIGS / str(row.get("config"))).is_file() and row["study"]["fits"]:
                yield {
                    "name": f"{name}, {_mesh(row['study'])}",
                    "where": row["study"]["topology"],
                    "from": file,
                    **_compared(row),
                }


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    from jaxllm.config import load_run
    from jaxllm.families import resolve_model, task_of
    from jaxllm.planning.jax_memory import jax_memory
    from jaxllm.planning.setting import setting_of

    study = row["study"]
    config = load_run(_CONFIGS / row["config"], row["overrides"]).config
    model = resolve_model(config.model, task=task_of(config.objective))
    expected = jax_memory(model, setting_of(config, "jax", study["devices"], study["attention"])).peak
    measured = study["needed_bytes"]
    return {"predicted": round(expected), "measured": measured, "error": round(expected / measured - 1, 4)}


def _mesh(study: dict[str, Any]) -> str:
    sizes = (f"{axis} {size}" for axis, size in study["mesh"].items() if size > 1)
    return f"{' x '.join(sizes)}, micro-batch {study['micro_batch']} x {study['sequence_length']}"
