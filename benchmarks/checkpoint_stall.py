"""How long saving a checkpoint stalls the JAX loop, against the time of copying the state to host memory.

    python -m benchmarks.checkpoint_stall [--hidden 512] [--layers 8] [--steps 3] [--repeats 10] [--json OUT]

Alternately, on the same state:
    copy      copying every shard of weights and both moments into host memory of its own
    stall     until `JaxBackend.save` returns
    delay     what the loop loses altogether: the save and the steps after it against as many steps without a save.  The first
              of them donates the very buffers that are being saved.  On the CPU this counts the writing, too, which takes
              processors from the steps; on an accelerator it does not.
Before each measurement the last file is on disk.  At the end the last checkpoint is compared with the copy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._report import write
from jaxllm.backend import Hyper
from jaxllm.config import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.families import resolve_model
from jaxllm.jax_backend import JaxBackend
from jaxllm.run import Run
from jaxllm.state import Progress

VOCABULARY, LENGTH, ROWS = 8192, 64, 2


def start(hidden: int, layers: int) -> tuple[JaxBackend, Run]:
    """A backend with a model of that size."""
    config = RunConfig.model_validate(
        {
            "name": "checkpoint-stall",
            "model": {
                "family": "llama",
                "hidden_size": hidden,
                "intermediate_size": 4 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "vocab_size": VOCABULARY,
            },
            "data": {"tokenizer": {"train": "bpe", "vocab_size": VOCABULARY}, "sequence_length": LENGTH},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": ROWS},
        }
    )
    run = Run(config, resolve_model(config.model), 1)
    backend = JaxBackend()
    backend.start(run, None)
    return backend, run


def step(backend: JaxBackend, number: int) -> None:
    """One optimiser step, finished."""
    tokens = np.random.default_rng(number).integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), np.cumsum(ones, axis=1, dtype=np.int32) - 1, ones)
    float(backend.step(batch, Hyper(1e-3, 1 - 0.9**number, 1 - 0.95**number)).loss)


def steps(backend: JaxBackend, count: int) -> None:
    """So many steps, each finished before the next."""
    for number in range(1, count + 1):
        step(backend, number)


def _seconds(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def copy_to_host(backend: JaxBackend) -> dict[str, list[np.ndarray]]:
    """Every shard of the state in host memory of its own."""
    trees = backend._trees()  # noqa: SLF001 - what `save` writes
    return {
        f"{name}.{path}": [np.array(shard.data) for shard in leaf.addressable_shards]
        for name, tree in trees.items()
        for path, leaf in tree.items()
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backend, run = start(arguments.hidden, arguments.layers)
    found: dict[str, list[float]] = {"copy": [], "stall": [], "delay": [], "on disk after": []}
    with tempfile.TemporaryDirectory() as temporary:
        for repeat in range(arguments.repeats + 1):
            undisturbed = _seconds(lambda: steps(backend, arguments.steps))
            begun = time.perf_counter()
            copied = copy_to_host(backend)
            copy = time.perf_counter() - begun
            folder = Path(temporary) / str(repeat)
            folder.mkdir()
            begun = time.perf_counter()
            backend.save(folder, Progress(repeat))
            stall = time.perf_counter() - begun
            disturbed = _seconds(lambda: steps(backend, arguments.steps))
            backend.wait()
            if repeat:  # the first one opens files and starts threads
                measured = (copy, stall, stall + disturbed - undisturbed, time.perf_counter() - begun)
                for times, one in zip(found.values(), measured, strict=True):
                    times.append(one)
        _compare(folder, run, copied)
    megabytes = 12 * run.model.parameters / 1e6
    print(f"state: {megabytes:.0f} MB ({run.model.parameters:,} parameters and two moments)")
    for name, seconds in found.items():
        print(f"{name:14} median {statistics.median(seconds) * 1e3:8.1f} ms, worst {max(seconds) * 1e3:8.1f} ms")
    results: dict[str, object] = {"megabytes": round(megabytes), "seconds": found}
    for name in ("stall", "delay"):
        ratio = statistics.median(one / copy for one, copy in zip(found[name], found["copy"], strict=True))
        results[f"{name} / copy"] = round(ratio, 4)
        print(f"{name} / copy: median {ratio:.3f}{' (bound 1)' if name == 'stall' else ''}")
    write(arguments.json, results)
    backend.close()


def _compare(folder: Path, run: Run, copied: dict[str, list[np.ndarray]]) -> None:
    """Stop if the checkpoint is not the state as it was when `save` was called."""
    from jaxllm.jax_backend.checkpoint import read_training_state

    saved = read_training_state(folder, run.model)
    for rule in run.model.rules:
        if rule.layers is None:
            (wanted,) = copied[f"params.{rule.paths[0]}"]
            np.testing.assert_array_equal(rule.to_flax(saved.params.read(rule.name))[0], wanted)


if __name__ == "__main__":
    main()
