"""How long the training step takes to compile at 12 and at 48 layers of the same width.

    python -m benchmarks.compile_time [--hidden 256] [--repeats 3] [--json OUT]

Layers are scanned, so the program does not grow with their number.  Each compilation runs in a fresh process without the
compilation cache; depths alternate, and the median of tracing + lowering + compiling is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks._report import write

DEPTHS = (12, 48)
TARGET = 1.3


def compile_once(layers: int, hidden: int) -> dict[str, float]:
    """Seconds of wall and processor time from the jitted function to the executable, in this process."""
    import jax

    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model
    from jaxllm.jax_backend.abstract import compile_step
    from jaxllm.jax_backend.assembly import assemble
    from jaxllm.jax_backend.mesh import create_mesh
    from jaxllm.jax_backend.process import configure_process
    from jaxllm.run import Run

    config = RunConfig.model_validate(
        {
            "name": "compile-time",
            "model": {
                "family": "llama",
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "vocab_size": 4096,
            },
            "data": {"tokenizer": {"train": "bpe", "vocab_size": 4096}, "sequence_length": 128},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": 4},
        }
    )
    configure_process(config)
    jax.config.update("jax_enable_compilation_cache", False)
    run, mesh = Run(config, resolve_model(config.model), 1), create_mesh(config)
    compiled = compile_step(assemble(run, mesh), run, mesh)
    return {"wall_s": compiled.seconds, "cpu_s": compiled.processor_seconds}


def measure(layers: int, hidden: int) -> dict[str, float]:
    """`compile_once` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--hidden", str(hidden), "--once", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.once is not None:
        print(json.dumps(compile_once(arguments.once, arguments.hidden)))
        return
    found: dict[int, list[dict[str, float]]] = {depth: [] for depth in DEPTHS}
    for _ in range(arguments.repeats):
        for depth in DEPTHS:
            found[depth].append(measure(depth, arguments.hidden))
    results: dict[str, object] = {"hidden": arguments.hidden, "repeats": arguments.repeats}
    medians = {}
    for depth, measured in found.items():
        medians[depth] = {key: statistics.median(one[key] for one in measured) for key in ("wall_s", "cpu_s")}
        results[f"{depth} layers"] = {"median": medians[depth], "all": measured}
        print(f"{depth} layers: median {medians[depth]['wall_s']:.2f} s ({medians[depth]['cpu_s']:.2f} s of the processor)")
    for key in ("wall_s", "cpu_s"):
        ratio = medians[DEPTHS[1]][key] / medians[DEPTHS[0]][key]
        results[f"ratio_{key.removesuffix('_s')}"] = round(ratio, 4)
        print(f"ratio ({key.removesuffix('_s')}): {ratio:.3f} (bound {TARGET})")
    write(arguments.json, results)


if __name__ == "__main__":
    main()
