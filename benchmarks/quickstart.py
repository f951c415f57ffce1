"""The quickstart, as a new user runs it, on both backends: how long it takes, what it reaches, how far the two are apart.

    python -m benchmarks.quickstart [FILE] [--backend jax|deepspeed|both] [--set A.B=VALUE] [--json OUT]

Each backend is `jaxllm train FILE` in a fresh process with empty caches (prepared data, compiled programs), so its time holds
everything from the start of Python to the sample at the end.  Bounds: under 5 minutes on 2 processors, a validation loss
clearly (half a nat) below the unigram entropy, and final numbers of the backends within 1e-4 of each other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import write
from jaxllm.metrics.sinks import parse_metrics

MINUTES = 5.0
MARGIN = 0.5
DIFFERENCE = 1e-4


def run(file: Path, backend: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train once; its metrics, time and sample."""
    settings = (*overrides, f"output_dir={folder}", f"data.cache_dir={folder / 'data'}")
    command = [sys.executable, "-m", "jaxllm", "train", str(file), "--backend", backend]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    begun = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    seconds = time.perf_counter() - begun
    (metrics,) = folder.glob("*/metrics.jsonl")
    records = parse_metrics(metrics.read_text())
    sample = metrics.parent / "sample.txt"
    return {
        "seconds": seconds,
        "records": records,
        "train": next(record for record in reversed(records) if record["split"] == "train"),
        "validation": next(record for record in reversed(records) if record["split"] == "validation"),
        "sample": sample.read_text() if sample.exists() else None,
    }


def unigram_entropy(file: Path, overrides: Sequence[str], folder: Path) -> float:
    """Entropy of the tokens' frequencies, in nats; the data is prepared already and only read."""
    from jaxllm.config import load_run
    from jaxllm.data.prepare import prepare

    config = load_run(file, (*overrides, f"data.cache_dir={folder / 'data'}")).config
    return prepare(config, progress=False).unigram_entropy


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart: at the end, and at the worst of all reports that both have."""
    losses = [{(r["split"], r["step"]): r["loss"] for r in run["records"]} for run in (one, other)]
    shared = losses[0].keys() & losses[1].keys()
    return {
        "final_train_loss": abs(one["train"]["loss"] - other["train"]["loss"]),
        "final_validation_loss": abs(one["validation"]["loss"] - other["validation"]["loss"]),
        "worst_loss": max(abs(losses[0][key] - losses[1][key]) for key in shared),
    }


def show(backend: str, result: dict[str, Any], entropy: float) -> None:
    loss = result["validation"]["loss"]
    print(f"\n{backend}: {result['seconds']:.1f} s, bound {MINUTES * 60:.0f} s: {_verdict(result['seconds'] < MINUTES * 60)}")
    print(f"  validation loss {loss:.4f}, unigram entropy {entropy:.4f}: {_verdict(loss < entropy - MARGIN)}")
    print(f"  training loss {result['train']['loss']:.4f} at step {result['train']['step']}; the sample:")
    print("\n".join(f"    {line}" for line in (result["sample"] or "").splitlines()))


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--backend", choices=["jax", "deepspeed", "both"], default="both")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backends = ("jax", "deepspeed") if arguments.backend == "both" else (arguments.backend,)
    results: dict[str, Any] = {"file": str(arguments.file), "set": arguments.overrides}
    with tempfile.TemporaryDirectory() as folder:
        for backend in backends:
            results[backend] = run(arguments.file, backend, arguments.overrides, Path(folder) / backend)
        results["unigram_entropy"] = unigram_entropy(arguments.file, arguments.overrides, Path(folder) / backends[0])
    for backend in backends:
        show(backend, results[backend], results["unigram_entropy"])
    if len(backends) == 2:
        results["difference"] = differences(*(results[backend] for backend in backends))
        apart = results["difference"]
        worst = max(apart["final_train_loss"], apart["final_validation_loss"])
        print(f"\nfinal losses of the backends differ by {worst:.2e}, bound {DIFFERENCE:.0e}: {_verdict(worst < DIFFERENCE)}")
        print(f"worst difference of any report: {apart['worst_loss']:.2e}")
    write(arguments.json, results)


if __name__ == "__main__":
    main()
