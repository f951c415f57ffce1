"""The framework tax: steps/s of the training loop against a bare hand-written loop, on the same state in the same process.

    python -m benchmarks.framework_tax [FILE] [--backend jax|deepspeed|both] [--pairs 10] [--block 10] [--set A.B=VALUE]
        [--json OUT]

The real loop (`jaxllm.training.train`, with its data pipeline, schedule, ledger, meter and all sinks) runs on a backend that
hands every call on, except that after each block of steps it stops the clock and runs a block of the bare loop:

    JAX         step = the backend's jitted function; params, moments, metrics = step(params, moments, device_put(batch), ...)
    DeepSpeed   logits = engine(...); engine.backward(cross_entropy(...)); engine.step() on the backend's DeepSpeed engine

The bare loops read a few batches over and over from memory, keep the learning rate constant, report nothing and wait for the
device once per block, so that they are as fast as a loop around this step can be.  The real loop does not evaluate or save
while it is measured.  Blocks alternate, so that other load on the machine meets both; each pair gives one ratio, and the
median of the ratios is the result.  The ratio of processor time per step is given beside it: it hardly depends on what else
the machine does, but it does not see waiting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._report import write
from jaxllm.backend import Hyper, StepResult, create_backend
from jaxllm.data.batch import Batch

TARGET = 0.97
KEPT_BATCHES = 4
WARM_UP_PAIRS = 1
BareBlock = Callable[[int], None]


class Spent(NamedTuple):
    """Seconds of a block: on the wall, and of the processor, all threads together."""

    wall: float
    cpu: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


def _now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def bare_jax(backend: Any, batches: Sequence[Batch], hyper: Hyper) -> BareBlock:
    """A hand-written loop around the jitted step of a started JaxBackend."""
    import jax
    import numpy as np

    from jaxllm.jax_backend.optimizer import step_scalars

    started = backend._started  # noqa: SLF001 - the loop stands in for the backend
    placed = [started.feed(batch) for batch in batches]
    arrays = [jax.tree.map(np.asarray, batch) for batch in placed]
    sharding = placed[0].inputs.sharding
    scalars = step_scalars(hyper, started.run.config.optimizer, started.network.runtime.policy.master)
    index = np.zeros((), np.uint32)
    source = cycle(arrays)

    def block(steps: int) -> None:
        params, moments, metrics = started.params, started.moments, None
        for _ in range(steps):
            batch = jax.device_put(next(source), sharding)
            params, moments, metrics = started.train_step(params, moments, batch, scalars, index)
        float(metrics.loss)
        started.params, started.moments = params, moments

    return block


def bare_deepspeed(backend: Any, batches: Sequence[Batch], hyper: Hyper) -> BareBlock:
    """A hand-written loop around the DeepSpeed engine of a started DeepSpeedBackend."""
    from torch.nn.functional import cross_entropy

    from jaxllm.torch_backend.model import model_inputs
    from jaxllm.torch_backend.step import split

    loop = backend._loop  # noqa: SLF001 - the loop stands in for the backend
    engine = loop.engine.model
    for group in engine.optimizer.param_groups:
        group["lr"] = hyper.learning_rate
    device, spec = loop.mesh.group.device, loop.spec
    inputs = [
        [model_inputs(part, spec, loop.attention, loop.engine.dtype, device) for part in split(batch, loop.plan.micro_batch)]
        for batch in batches
    ]
    source = cycle(inputs)

    def block(steps: int) -> None:
        engine.train()
        for _ in range(steps):
            for part in next(source):
                logits = engine(**part.arguments).logits
                loss = cross_entropy(logits.flatten(0, 1).float(), part.targets.flatten())
                engine.backward(loss)
                engine.step()
        float(loss.detach())

    return block


class Alternating:
    """A backend that hands everything on, and interrupts the loop that drives it for blocks of the bare loop."""

    def __init__(self, backend: Any, make_bare: Callable[[Any, Sequence[Batch], Hyper], BareBlock], block: int) -> None:
        self._backend = backend
        self._make_bare = make_bare
        self._block = block
        self._batches: list[Batch] = []
        self._bare: BareBlock | None = None
        self._calls = 0
        self._last: StepResult | None = None
        self._begun = _now()
        self.real: list[Spent] = []
        self.bare: list[Spent] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, batch: Batch, hyper: Hyper) -> StepResult:
        """Steps 1 + n * block, n = 0, 1, ..., are preceded by a bare block; the first step compiles and is not measured."""
        if len(self._batches) < KEPT_BATCHES:
            self._batches.append(batch)
        if self._calls and (self._calls - 1) % self._block == 0:
            self._change_over(hyper)
        self._last = self._backend.step(batch, hyper)
        self._calls += 1
        return self._last

    def _change_over(self, hyper: Hyper) -> None:
        assert self._last is not None
        float(self._last.loss)
        if self._calls > 1:
            self.real.append(_now() - self._begun)
        if self._calls > self._block:
            if self._bare is None:
                self._bare = self._make_bare(self._backend, self._batches, hyper)
            begun = _now()
            self._bare(self._block)
            self.bare.append(_now() - begun)
        self._begun = _now()


def measure(file: Path, backend_name: str, overrides: Sequence[str], pairs: int, block: int) -> dict[str, Any]:
    """Alternate `pairs` measured blocks of both loops in this process."""
    from jaxllm.config import load_run
    from jaxllm.training import prepare, train

    pairs += WARM_UP_PAIRS
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            *overrides, f"backend={backend_name}", f"output_dir={folder}", f"training.steps={pairs * block + 2}",
            "schedule.warmup_steps=1", "evaluation={every: null, batches: 1}", "checkpoint.every=null",
            "sample.max_new_tokens=0",
        )  # fmt: skip
        config = load_run(file, settings).config
        plan = prepare(config, resume=False, overwrite=False, allow_changed=(), report=print, progress=False)
        make_bare = bare_jax if backend_name == "jax" else bare_deepspeed
        alternating = Alternating(create_backend(config.backend), make_bare, block)
        train(plan, alternating, "")
    real, bare = alternating.real[WARM_UP_PAIRS:], alternating.bare[WARM_UP_PAIRS:]
    ratios = [theirs.wall / ours.wall for ours, theirs in zip(real, bare, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "real_steps_per_s": block / statistics.median(spent.wall for spent in real),
        "bare_steps_per_s": block / statistics.median(spent.wall for spent in bare),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "ratio_range": [min(ratios), max(ratios)],
        "ratios": ratios,
        "processor_time_ratio": statistics.median(theirs.cpu / ours.cpu for ours, theirs in zip(real, bare, strict=True)),
        "pairs": len(ratios),
        "steps_per_block": block,
    }


def show(backend: str, result: dict[str, Any]) -> None:
    low, high = result["ratio_quartiles"]
    verdict = "reached" if result["ratio"] >= TARGET else "MISSED"
    print(
        f"{backend:10} jaxllm {result['real_steps_per_s']:8.3f} steps/s   bare {result['bare_steps_per_s']:8.3f} steps/s   "
        f"ratio {result['ratio']:.4f} (quartiles {low:.4f} to {high:.4f}, {result['pairs']} pairs of "
        f"{result['steps_per_block']} steps; processor time {result['processor_time_ratio']:.4f})   target {TARGET}: {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--backend", choices=["jax", "deepspeed", "both"], default="both")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        result = measure(arguments.file, arguments.backend, arguments.overrides, arguments.pairs, arguments.block)
        arguments.json.write_text(json.dumps(result))
        return
    results: dict[str, Any] = {"file": str(arguments.file), "set": arguments.overrides, "target": TARGET}
    for backend in ("jax", "deepspeed") if arguments.backend == "both" else (arguments.backend,):
        with tempfile.TemporaryDirectory() as folder:  # a fresh process each: the frameworks' threads must not compete
            out = Path(folder) / "result.json"
            command = [sys.executable, "-m", "benchmarks.framework_tax", str(arguments.file), "--worker", "--backend", backend]
            command += ["--pairs", str(arguments.pairs), "--block", str(arguments.block), "--json", str(out)]
            command += [part for override in arguments.overrides for part in ("--set", override)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results[backend] = json.loads(out.read_text())
        show(backend, results[backend])
    write(arguments.json, results)


if __name__ == "__main__":
    main()
