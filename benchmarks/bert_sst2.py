"""A small BERT learns SST-2's sentences from scratch on both backends: accuracy, and how far the two are apart.

    python -m benchmarks.bert_sst2 FOLDER [--backend jax|deepspeed|both] [--set A.B=VALUE] [--json OUT]

FOLDER holds train.tsv (6,920 sentences) and dev.tsv (872), each with the columns `sentence` and `label` (0 or 1).  Each backend
is `jaxllm train` on benchmarks/bert_sst2.yaml in a fresh process, then `jaxllm eval` of the run it leaves.  There is no dropout
and the seeds are equal, so that both do the same arithmetic.  Bounds: an accuracy over 0.75, and predictions of the backends
that differ in at most one example.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import write
from jaxllm.metrics.sinks import parse_metrics

FILE = Path(__file__).with_suffix(".yaml")
ACCURACY = 0.75
EXAMPLES = 1


def settings(data: Path, folder: Path, overrides: list[str]) -> list[str]:
    """What is changed of the run file: where data and results are."""
    given = [
        f"data.source.files={data / 'train.tsv'}",
        f"data.validation_source.files={data / 'dev.tsv'}",
        f"output_dir={folder}",
        f"data.cache_dir={folder / 'data'}",
        *overrides,
    ]
    return [part for setting in given for part in ("--set", setting)]


def measure(backend: str, data: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train once and evaluate what came out."""
    command = [sys.executable, "-m", "jaxllm", "train", str(FILE), "--backend", backend, "--set", f"name={backend}"]
    begun = time.perf_counter()
    subprocess.run([*command, *settings(data, folder, overrides)], check=True)
    seconds = time.perf_counter() - begun
    out = folder / f"{backend}.json"
    subprocess.run([sys.executable, "-m", "jaxllm", "eval", str(folder / backend), "--json", str(out)], check=True)
    records = parse_metrics((folder / backend / "metrics.jsonl").read_text())
    return {"seconds": seconds, "evaluation": json.loads(out.read_text()), "records": records}


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Examples that the confusion matrices place differently (at least), and the relative difference of the losses."""
    first, second = (side["evaluation"]["measures"]["confusion"] for side in (one, other))
    moved = sum(abs(a - b) for row, others in zip(first, second, strict=True) for a, b in zip(row, others, strict=True)) / 2
    losses = [side["evaluation"]["loss"] for side in (one, other)]
    steps = [[record["loss"] for record in side["records"] if record["split"] == "train"] for side in (one, other)]
    return {
        "examples": moved,
        "validation_loss": abs(losses[0] - losses[1]) / losses[1],
        "training_loss": max(abs(a - b) / b for a, b in zip(*steps, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", choices=["jax", "deepspeed", "both"], default="both")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    backends = ["jax", "deepspeed"] if arguments.backend == "both" else [arguments.backend]
    with tempfile.TemporaryDirectory() as made:
        sides = {name: measure(name, arguments.folder.resolve(), Path(made), arguments.overrides) for name in backends}
    results: dict[str, Any] = {}
    for name, side in sides.items():
        accuracy = side["evaluation"]["measures"]["values"]["accuracy"]
        side["evaluation"]["model"] = name
        results[name] = side
        print(f"{name}: accuracy {accuracy:.4f} (bound {ACCURACY}) in {side['seconds']:.0f} s")
    if len(sides) == 2:
        results["apart"] = apart(sides["jax"], sides["deepspeed"])
        said = ", ".join(f"{name} {value:.3g}" for name, value in results["apart"].items())
        print(f"JAX against DeepSpeed: {said} (bound {EXAMPLES} example)")
    write(arguments.json, results)


if __name__ == "__main__":
    main()
