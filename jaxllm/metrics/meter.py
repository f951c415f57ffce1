"""The throughput meter: how fast the steps are, without what is not a step, and how long the rest of the run will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """Rates over one logging interval, over all devices; None where the interval holds no timed step.

    tokens_per_second: input positions, padding included, since every one is computed.  model_tflops: 1e12 model FLOP/s, with
    the FLOPs of `jaxllm.metrics.flops`.  mfu: model FLOP/s as a fraction of the devices' bf16 peak (arXiv:2204.02311); None
    where the peak is not known or the precision is not bf16.
    """

    tokens_per_second: float | None
    model_tflops: float | None
    mfu: float | None


class Meter:
    """Measures the steps of one process.

    Left out of the rates: the first step, which compiles, and whatever happens inside `pause` (evaluation, checkpoints).
    Steps run asynchronously, so the caller waits for a step's result (`float(result.loss)`) before the first `step`, before
    `pause` and before `lap`; in between it need not wait.

    flops_per_token: model FLOPs of training on one token.  peak_flops: of all devices, see `chips.peak_flops`.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._total_steps = total_steps
        self._step = start_step
        self._begun = self._interval_begun = clock()
        self._interval_paused = 0.0
        self._interval_tokens = 0
        self._interval_steps = 0
        self._compiled = False
        self._timed_steps = 0
        self._timed_seconds = 0.0
        self._paused_seconds = 0.0

    def step(self, tokens: int) -> None:
        """One step over `tokens` input positions (of all processes) was given to the devices."""
        self._step += 1
        if not self._compiled:
            self._compiled = True
            self._start_interval()
            return
        self._interval_tokens += tokens
        self._interval_steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside counts towards the run, and towards the time left, but not towards the rates."""
        begun = self._clock()
        try:
            yield
        finally:
            paused = self._clock() - begun
            self._interval_paused += paused
            self._paused_seconds += paused

    def lap(self) -> Throughput:
        """The rates since the last `lap`; starts the next interval."""
        seconds = self._clock() - self._interval_begun - self._interval_paused
        tokens, steps = self._interval_tokens, self._interval_steps
        self._start_interval()
        if steps == 0 or seconds <= 0.0:
            return Throughput(None, None, None)
        self._timed_steps += steps
        self._timed_seconds += seconds
        rate = tokens / seconds
        flops = rate * self._flops_per_token
        return Throughput(rate, flops / 1e12, flops / self._peak_flops if self._peak_flops else None)

    @property
    def seconds(self) -> float:
        """Wall-clock time since this meter was made."""
        return self._clock() - self._begun

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time until the last step, pauses included in the share they had so far; None before the first lap."""
        if self._timed_steps == 0:
            return None
        per_step = (self._timed_seconds + self._paused_seconds) / self._timed_steps
        return per_step * max(self._total_steps - self._step, 0)

    def _start_interval(self) -> None:
        self._interval_begun = self._clock()
        self._interval_paused = 0.0
        self._interval_tokens = 0
        self._interval_steps = 0
