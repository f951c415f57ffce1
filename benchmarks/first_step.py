"""From pressing return to the first step: `jaxllm train` with its compiled programs in the cache and without, on both backends.

    python -m benchmarks.first_step [FILE] [--repeats 3] [--set A.B=VALUE] [--json OUT]

Each time is a fresh process, from its start to the line of the first step in metrics.jsonl; the data are prepared, as they are
for every run but a file's first.  `cold` has an empty compilation cache, `warm` the one that `cold` has left.  PyTorch keeps no
such cache: its two numbers differ by noise alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._report import write

DEFAULT = Path("configs/quickstart.yaml")
SETTINGS = ("logging.every=1", "logging.sinks=[jsonl]")
POLL = 0.005


def first_step(file: Path, backend: str, overrides: Sequence[str], folder: Path) -> float:
    """Seconds to the first step's record.  The run is then stopped, and what it left removed."""
    run = folder / "runs"
    settings = (*SETTINGS, *overrides, f"output_dir={run}", f"data.cache_dir={folder / 'data'}")
    command = [sys.executable, "-m", "jaxllm", "train", str(file), "--backend", backend]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not any('"loss"' in path.read_text() for path in run.glob("*/metrics.jsonl")):
            if process.poll() is not None:
                raise SystemExit(f"jaxllm train ended with status {process.returncode} before its first step")
            time.sleep(POLL)
        return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(run, ignore_errors=True)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        first_step(arguments.file, "jax", arguments.overrides, folder)  # prepares the data
        for _ in range(arguments.repeats):
            for backend in ("jax", "deepspeed"):
                shutil.rmtree(folder / "xla", ignore_errors=True)
                for name in ("cold", "warm"):
                    found = first_step(arguments.file, backend, arguments.overrides, folder)
                    times.setdefault(f"{backend}, {name}", []).append(found)
    results = {name: {"median_s": statistics.median(found), "all_s": found} for name, found in times.items()}
    for name, found in results.items():
        print(f"{name:18} {found['median_s']:.2f} s")
    write(arguments.json, {"file": str(arguments.file), "repeats": arguments.repeats, **results})


if __name__ == "__main__":
    main()
