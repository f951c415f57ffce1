"""What steps reported, turned into progress, one step behind the device so that the device never waits for the host."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxllm.backend import StepResult
from jaxllm.config.schema import TrainingConfig
from jaxllm.errors import NonFiniteError
from jaxllm.state import Progress


@dataclass(frozen=True)
class Settled:
    """The host's copy of one step's result.  step: the number of steps done after it."""

    step: int
    loss: float
    gradient_norm: float
    statistics: Mapping[str, float]


class Ledger:
    """Progress of a run and its last settled step.

    With `training.non_finite: skip` every step is settled at once, since whether it was applied decides the next step's bias
    correction; with `stop` the newest step stays pending until the one after it has been handed to the device.
    """

    def __init__(self, progress: Progress, training: TrainingConfig) -> None:
        self._progress = progress
        self._training = training
        self._pending: deque[StepResult] = deque()
        self.last: Settled | None = None

    @property
    def step(self) -> int:
        """Steps handed to the device."""
        return self._progress.step + len(self._pending)

    @property
    def updates(self) -> int:
        """Updates applied, taking those not yet settled as applied."""
        return self._progress.updates + len(self._pending)

    @property
    def skipped(self) -> int:
        """Steps left out because their loss or gradient was not finite."""
        return self._progress.step - self._progress.updates

    def add(self, result: StepResult) -> None:
        """Take a step's result; NonFiniteError when it, or an earlier one, must stop the run."""
        self._pending.append(result)
        keep = 0 if self._training.non_finite == "skip" else 1
        while len(self._pending) > keep:
            self._settle_oldest()

    def settle(self) -> Progress:
        """Wait for every step handed to the device; the progress after them."""
        while self._pending:
            self._settle_oldest()
        return self._progress

    def _settle_oldest(self) -> None:
        result = self._pending.popleft()
        loss, norm = float(result.loss), float(result.gradient_norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        before = self._progress
        self._progress = replace(
            before,
            step=before.step + 1,
            updates=before.updates + finite,
            samples=before.samples + self._training.global_batch,
            tokens=before.tokens + round(float(result.target_tokens)),
        )
        self.last = Settled(self._progress.step, loss, norm, {name: float(value) for name, value in result.statistics.items()})
        if not finite:
            self._judge(loss, norm)

    def _judge(self, loss: float, norm: float) -> None:
        found = f"step {self._progress.step}: the loss is {loss:g} and the gradient norm {norm:g}"
        if self._training.non_finite == "stop":
            raise NonFiniteError(
                f"{found}; lower optimizer.learning_rate or lengthen schedule.warmup_steps, "
                "or leave such steps out with training.non_finite: skip"
            )
        if self.skipped >= self._training.non_finite_limit:
            raise NonFiniteError(
                f"{found}, and {self.skipped} steps have been left out, which is training.non_finite_limit; "
                "lower optimizer.learning_rate or raise the limit"
            )
