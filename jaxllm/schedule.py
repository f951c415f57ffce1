"""The learning rate of every step, and the scalars of an AdamW update, computed on the host in double precision."""

from __future__ import annotations

import math

from jaxllm.backend import Hyper
from jaxllm.config.schema import OptimizerConfig, RunConfig, ScheduleConfig
from jaxllm.errors import ConfigError


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of a step, counted from 0.

    Warm-up: step k < W of W warm-up steps has (k + 1) / W of the highest rate, so no step is wasted at zero and step W - 1 is
    the first at the highest rate.  From there `constant` stays; `linear` and `cosine` (arXiv:1608.03983, without restarts)
    go down to final_fraction of it, which the last step has exactly.  Without warm-up the first step has the highest rate.  A
    run that ends with its warm-up, or has a single step, does not decay.

    Raises ConfigError when the warm-up is longer than the run.
    """
    check_schedule(total_steps, schedule)
    peak, warmup = optimizer.learning_rate, schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    highest, last = max(warmup - 1, 0), total_steps - 1
    if schedule.kind == "constant" or last == highest:
        return peak
    done = min((step - highest) / (last - highest), 1.0)
    # As a mean of the two ends, so that both are reached exactly.
    remaining = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (remaining + schedule.final_fraction * (1.0 - remaining))


def check_schedule(total_steps: int, schedule: ScheduleConfig) -> None:
    """Raise ConfigError when the schedule does not fit a run of `total_steps` steps."""
    if schedule.warmup_steps > total_steps:
        raise ConfigError(
            "schedule.warmup_steps",
            f"the warm-up of {schedule.warmup_steps} steps is longer than the run of {total_steps}; "
            f"set it to at most {total_steps}, or train longer",
        )


def hyper(step: int, updates: int, total_steps: int, config: RunConfig) -> Hyper:
    """The scalars of a step: `step` batches were consumed and `updates` updates applied before it.

    The bias corrections count updates, not steps, since a skipped step leaves the moments as they were.
    """
    beta1, beta2 = config.optimizer.betas
    return Hyper(
        learning_rate=learning_rate(step, total_steps, config.optimizer, config.schedule),
        bias_correction1=1.0 - beta1 ** (updates + 1),
        bias_correction2=1.0 - beta2 ** (updates + 1),
    )
