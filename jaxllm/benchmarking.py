"""How fast a run file trains here: a step's time and where it goes, tokens/s, model FLOP/s, memory, time to the first step.

The same loop as `jaxllm.training` without evaluation, checkpoints and logging, on the run's own data.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from jaxllm.backend import Backend, StepResult
from jaxllm.config import tokens_per_step
from jaxllm.data.batch import Batch
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData
from jaxllm.metrics.chips import peak_flops
from jaxllm.metrics.flops import flops_per_token
from jaxllm.run import Run
from jaxllm.schedule import hyper

BLOCKS = 5
"""Throughput is the median of so many blocks of steps, so that a moment's disturbance does not decide it."""

PROFILED_STEPS = 3


@dataclass(frozen=True)
class Split:
    """Median seconds of one step when the host waits for each.

    data: until the batch is there.  step: from handing it to the backend until the devices are done.  host: the rest.
    """

    data: float
    step: float
    host: float


@dataclass(frozen=True)
class Measurement:
    """What `jaxllm bench` prints.

    split: see `Split`.  step_seconds: of one step when steps follow each other as in training, where the host prepares the
    next while the devices work; the median of `BLOCKS` blocks, fastest and slowest: of the other blocks.  tokens_per_second,
    model_tflops (1e12 model FLOP/s, formula of `jaxllm.metrics.flops`), mfu (of the devices' bf16 peak; None where it is not
    known) follow from it.  start_seconds: from the start of the backend to the end of the first step; compile_seconds: what
    the backend's start spent on compiling, and the first step beyond what a step costs.  memory_bytes: peak of the busiest
    device (of the process on CPU).  losses: of every step, so that two measurements can be seen to have done the same work.
    device: as the backend describes it.
    """

    steps: int
    split: Split
    step_seconds: float
    fastest: float
    slowest: float
    tokens_per_second: float
    model_tflops: float
    mfu: float | None
    start_seconds: float
    compile_seconds: float
    memory_bytes: int | None
    losses: tuple[float, ...]
    device: Mapping[str, object]


def measure(
    run: Run, data: PreparedData, backend: Backend, *, steps: int, warmup: int, profile: Path | None = None
) -> Measurement | None:
    """Start the backend, train `steps` steps twice (waiting for each, then as training does), and close it (collective).

    warmup: steps after the first that are not measured.  profile: a folder for a trace of a few more steps.  None in the
    processes of a group that are not its main one.
    """
    begun = time.perf_counter()
    backend.start(run, None)
    try:
        with BatchPipeline(data, run.config, "train", backend.shard, 0) as batches:
            loop = _Loop(run, backend, batches)
            first = _timed(loop.wait_for_a_step)
            started = time.perf_counter() - begun
            for _ in range(warmup):
                loop.wait_for_a_step()
            split = _split(loop, steps)
            blocks = [_timed(lambda: loop.follow(max(steps // BLOCKS, 1))) / max(steps // BLOCKS, 1) for _ in range(BLOCKS)]
            with _tracing(backend, profile):
                loop.follow(PROFILED_STEPS if profile else 0)
        seconds = statistics.median(blocks)
        rate = tokens_per_step(run.config) / seconds
        flops = rate * flops_per_token(run.model.spec, run.config.data.sequence_length, run.config.data.target_length).training
        peak = _peak(run, backend)
        measured = Measurement(
            steps=steps,
            split=split,
            step_seconds=seconds,
            fastest=min(blocks),
            slowest=max(blocks),
            tokens_per_second=rate,
            model_tflops=flops / 1e12,
            mfu=flops / peak if peak else None,
            start_seconds=started,
            compile_seconds=backend.compile_seconds + max(first - split.step, 0.0),
            memory_bytes=backend.memory_bytes(),
            losses=loop.losses(),
            device=backend.device_description(),
        )
        return measured if backend.is_main else None
    finally:
        backend.close()


class _Loop:
    """Steps on the run's own batches.  Beyond the run's last step the learning rate stays that of the last."""

    def __init__(self, run: Run, backend: Backend, batches: Iterator[Batch]) -> None:
        self._run = run
        self._backend = backend
        self._batches = batches
        self._results: list[StepResult] = []

    def next_batch(self) -> Batch:
        return next(self._batches)

    def step(self, batch: Batch) -> StepResult:
        number = min(len(self._results), self._run.total_steps - 1)
        result = self._backend.step(batch, hyper(number, number, self._run.total_steps, self._run.config))
        self._results.append(result)
        return result

    def wait_for_a_step(self) -> None:
        float(self.step(self.next_batch()).loss)

    def follow(self, steps: int) -> None:
        """Steps as in training: the host waits for the devices only after the last."""
        for _ in range(steps):
            result = self.step(self.next_batch())
        if steps:
            float(result.loss)

    def losses(self) -> tuple[float, ...]:
        return tuple(float(result.loss) for result in self._results)


def _split(loop: _Loop, steps: int) -> Split:
    data, device, host = [], [], []
    end = time.perf_counter()
    for _ in range(steps):
        begin = time.perf_counter()
        batch = loop.next_batch()
        read = time.perf_counter()
        float(loop.step(batch).loss)
        done = time.perf_counter()
        host.append(begin - end)
        data.append(read - begin)
        device.append(done - read)
        end = done
    return Split(statistics.median(data), statistics.median(device), statistics.median(host))


def _timed(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _tracing(backend: Backend, folder: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if folder is None else backend.profile(folder)


def _peak(run: Run, backend: Backend) -> float | None:
    described = backend.device_description()
    devices = described.get("devices")
    return peak_flops(str(described.get("chip")), devices, run.config.training.precision) if isinstance(devices, int) else None
