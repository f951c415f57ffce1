"""Joining the other processes of a run.

Workers that `jaxllm.jax_backend.launch` starts find each other through three environment variables which it sets for them and
nobody else is meant to; they stand in one place, `Rendezvous`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of a run meet.  coordinator: host:port of process 0.  index, count: of this process, of all."""

    coordinator: str
    index: int
    count: int

    def environment(self) -> dict[str, str]:
        """The variables that tell a worker this."""
        return {
            "JAXLLM_COORDINATOR": self.coordinator,
            "JAXLLM_PROCESS_INDEX": str(self.index),
            "JAXLLM_PROCESS_COUNT": str(self.count),
        }

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
        """What a launcher told this process, or None when it was started by hand."""
        coordinator = environment.get("JAXLLM_COORDINATOR")
        if coordinator is None:
            return None
        return Rendezvous(coordinator, int(environment["JAXLLM_PROCESS_INDEX"]), int(environment["JAXLLM_PROCESS_COUNT"]))


def join() -> bool:
    """Join the other processes, if there are any; whether there are.  To be called before JAX looks for devices."""
    import jax

    rendezvous = Rendezvous.from_environment()
    if rendezvous is None or rendezvous.count == 1:
        return False
    if not jax.distributed.is_initialized():
        _keep_gloo_off_stdout()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It would take SIGTERM away from the training loop, which finishes the step and saves.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(rendezvous.coordinator, rendezvous.count, rendezvous.index)
    return True


def _keep_gloo_off_stdout() -> None:
    """Move Python's standard output to a descriptor of its own: gloo writes a line for every communicator to descriptor 1."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def leave() -> None:
    """Leave the other processes (collective)."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
