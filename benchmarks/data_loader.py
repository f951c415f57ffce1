"""How many tokens a second one process is served from prepared data.

    python -m benchmarks.data_loader [--seconds 3] [--json OUT]

Reads batches of the standard library of the running Python as a training step would, through the whole pipeline: permutation,
packing, shifting, weights, and prefetching as configured by default, and without prefetching.  A token counts once, though a
batch holds five arrays of it.

Two kinds of rows: long documents (modules), of which a sequence sees few, and short ones (single lines), of which it sees
dozens.

Beside the wall clock, tokens are counted against the processor time of this process, which other load on the machine does not
change.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import write
from jaxllm.config.schema import RunConfig
from jaxllm.config.source import PythonSource
from jaxllm.data.document import SkipCount
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import read_documents

GOAL = 5e6


def measure(seconds: float) -> dict[str, Any]:
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "lines.txt"
        lines.write_text("\n".join(document.text for document in read_documents(PythonSource(max_documents=150), SkipCount())))
        sources: dict[str, dict[str, Any]] = {
            "modules": {"kind": "python-source"},
            "lines": {"kind": "text", "files": str(lines), "document": "line"},
        }
        for documents, source in sources.items():
            for packing in ("concatenate", "none"):
                for length, batch in ((256, 16), (2048, 32)):
                    for prefetch in (4, 0):
                        config = run_config(Path(scratch), source, packing, length, batch, prefetch)
                        speed, cpu_speed = tokens_per_second(config, seconds)
                        cases.append(
                            {
                                "documents": documents,
                                "packing": packing,
                                "sequence_length": length,
                                "batch": batch,
                                "prefetch": prefetch,
                                "tokens_per_second": speed,
                                "tokens_per_cpu_second": cpu_speed,
                            }
                        )
                        shape = f"{batch:3} x {length:5}, prefetch {prefetch}"
                        rates = f"{speed / 1e6:6.1f} million tokens/s, {cpu_speed / 1e6:6.1f} per CPU second"
                        print(f"{documents:8} {packing:12} {shape}  {rates}")
    return {
        "cases": cases,
        "slowest_tokens_per_second": min(case["tokens_per_second"] for case in cases),
        "slowest_tokens_per_cpu_second": min(case["tokens_per_cpu_second"] for case in cases),
        "goal": GOAL,
    }


def tokens_per_second(config: RunConfig, seconds: float) -> tuple[float, float]:
    with BatchPipeline(prepare(config, progress=False), config, "train") as pipeline:
        for _ in range(20):
            next(pipeline)
        start, cpu_start, tokens = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            tokens += next(pipeline).inputs.size
        return tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu_start)


def run_config(scratch: Path, source: dict[str, Any], packing: str, length: int, batch: int, prefetch: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"family": "llama"},
            "data": {
                "source": source,
                "tokenizer": {"train": "bpe", "vocab_size": 4096},
                "sequence_length": length,
                "packing": packing,
                "prefetch": prefetch,
                "cache_dir": str(scratch / "cache"),
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": batch},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    result = measure(arguments.seconds)
    slowest = f"{result['slowest_tokens_per_second'] / 1e6:.1f} million tokens/s"
    cpu = f"{result['slowest_tokens_per_cpu_second'] / 1e6:.1f} per CPU second"
    print(f"slowest: {slowest}, {cpu} (goal: over {GOAL / 1e6:.0f})")
    write(arguments.json, result)


if __name__ == "__main__":
    main()
