"""Run: a run file made definite, the one value both backends are started with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxllm.config.schema import ParallelConfig, RunConfig
from jaxllm.families import Model


@dataclass(frozen=True)
class Run:
    """A resolved run.  total_steps: optimiser steps of the whole run."""

    config: RunConfig
    model: Model
    total_steps: int


def on_one_device(run: Run) -> Run:
    """The same model and numbers, laid out for one device and one process."""
    config = run.config
    single = {
        "parallel": ParallelConfig(data=1),
        "jax": config.jax.model_copy(update={"cpu_devices": 1}),
        "deepspeed": config.deepspeed.model_copy(
            update={"zero_stage": 0, "offload_optimizer": "none", "offload_param": "none"}
        ),
    }
    return replace(run, config=config.model_copy(update=single))
