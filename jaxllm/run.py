"""Run: a run file made definite, the one value both backends are started with."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.config.schema import RunConfig
from jaxllm.families import Model


@dataclass(frozen=True)
class Run:
    """A resolved run.  total_steps: optimiser steps of the whole run."""

    config: RunConfig
    model: Model
    total_steps: int
