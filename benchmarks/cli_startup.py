"""How long `jaxllm --help` takes, interpreter start included: the median and worst of several fresh processes.

python -m benchmarks.cli_startup [--runs 20] [--json OUT]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._report import write

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "jaxllm --help": [sys.executable, "-m", "jaxllm", "--help"],
    "jaxllm train --help": [sys.executable, "-m", "jaxllm", "train", "--help"],
    "jaxllm config check": [sys.executable, "-m", "jaxllm", "config", "check", "configs/quickstart.yaml"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command in a fresh process."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name, command in COMMANDS.items():
        seconds(command)  # writes the byte code
        times = [seconds(command) for _ in range(arguments.runs)]
        results[name] = {"median_s": round(statistics.median(times), 4), "worst_s": round(max(times), 4)}
        print(f"{name:24} median {results[name]['median_s']:.3f} s, worst {results[name]['worst_s']:.3f} s")
    write(arguments.json, {"runs": arguments.runs, **results})


if __name__ == "__main__":
    main()
