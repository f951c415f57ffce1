"""What the driver and a contender's process say to each other, and the clock that all contenders are timed by.

Needs the standard library and numpy alone, so that every contender's environment can import it.

A process is started as `python -m benchmarks.throughput.workers.NAME REQUEST.json ANSWER.json`.  It trains on the batches of
the request, in their order, from its weights, with the AdamW of this file, and calls `Clock.done` after each step.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
"""AdamW of every contender, its rate constant; only tensors of two or more dimensions decay."""


@dataclass(frozen=True)
class Request:
    """What is to be done.

    folder: config.json (of transformers), *.safetensors, tokens.npy (steps, B, S + 1).  precision: fp32 or bf16 (with fp32
    masters).  device: cpu or cuda.  compared: steps whose losses are reported, the first of which compiles; warmup: steps after
    them that are not timed; blocks of block_steps steps are.  options: of the contender.
    """

    folder: str
    precision: str
    device: str
    compared: int
    warmup: int
    blocks: int
    block_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.compared + self.warmup + self.blocks * self.block_steps

    @property
    def config(self) -> dict[str, Any]:
        """The keys of transformers' config."""
        read: dict[str, Any] = json.loads((Path(self.folder) / "config.json").read_text())
        return read

    def tokens(self) -> NDArray[np.int64]:
        """(steps, B, S + 1), the first steps of the file over and over."""
        stored = np.load(Path(self.folder) / "tokens.npy")
        return np.asarray(stored[np.arange(self.steps) % len(stored)], np.int64)


@dataclass(frozen=True)
class Answer:
    """What was measured.

    losses: of the compared steps.  step_seconds: of a step, one number for each block.  first_seconds: of the first step, which
    compiles, and of what was compiled before it.  start_seconds: until it was done, from the start of the process's work.
    memory_bytes: peak of the device, on a CPU of the process; added_bytes: on a CPU, what that is above what
    imports had taken before.
    """

    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    first_seconds: float
    start_seconds: float
    memory_bytes: int
    added_bytes: int | None
    versions: Mapping[str, str]


class Clock:
    """Times the steps of one process.  Imports are done before it is made."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._imported = resident_bytes()
        self._begun = self._mark = time.perf_counter()
        self._done = 0
        self._first = self._start = self._compiled = 0.0
        self._losses: list[float] = []
        self._seconds: list[float] = []

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """(B, S + 1) of every step; the clock of the first starts when it is taken."""
        tokens = self.request.tokens()
        self._mark = time.perf_counter()
        yield from tokens

    def compiled(self, seconds: float) -> None:
        """What was spent on compiling before the first step."""
        self._compiled = seconds

    def done(self, loss: Any) -> None:
        """A step was handed to the device; `float(loss)` waits for it."""
        request, self._done = self.request, self._done + 1
        if self._done <= request.compared:
            self._losses.append(float(loss))
            if self._done == 1:
                self._first = self._compiled + time.perf_counter() - self._mark
                self._start = time.perf_counter() - self._begun
        timed = self._done - request.compared - request.warmup
        if timed == 0:
            float(loss)
            self._mark = time.perf_counter()
        elif timed > 0 and timed % request.block_steps == 0:
            float(loss)
            now = time.perf_counter()
            self._seconds.append((now - self._mark) / request.block_steps)
            self._mark = now

    def answer(self, memory_bytes: int | None = None) -> Answer:
        """memory_bytes: peak of the accelerator; None: of the process."""
        peak = peak_bytes() if memory_bytes is None else memory_bytes
        added = None if memory_bytes is not None else max(peak - self._imported, 0)
        return Answer(
            tuple(self._losses), tuple(self._seconds), self._first, self._start, peak, added, _versions()
        )  # fmt: skip


def peak_bytes() -> int:
    """Peak of the process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident memory of the process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize() if pages else peak_bytes()


def read_request() -> Request:
    """The request that this process was started with."""
    return Request(**json.loads(Path(sys.argv[1]).read_text()))


def write_answer(answer: Answer) -> None:
    """Hand the answer to the driver."""
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)))


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "torch", "transformers", "deepspeed", "accelerate", "litgpt", "lightning", "optax", "flax")
    return {dist.name: dist.version for dist in metadata.distributions() if dist.name in names}
