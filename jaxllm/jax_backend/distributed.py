"""Joining the other processes of a run.

Workers that `jaxllm.jax_backend.launch` starts find each other through environment variables which it sets for them and nobody
else is meant to; they stand in one place, `Rendezvous`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.errors import BackendError

JOIN_SECONDS = 300
"""How long a process waits for the others when the run starts."""

_PREFIX = "JAXLLM_"


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of a run meet.

    coordinator: host:port of process 0; None: a TPU pod, where JAX finds it.  index, count: of this process, of all.
    local_device: the only GPU this process drives, where several processes share a machine; None: every device of the machine.
    """

    coordinator: str | None
    index: int
    count: int
    local_device: int | None = None

    def environment(self) -> dict[str, str]:
        """The variables that tell a worker this."""
        values = {
            "COORDINATOR": self.coordinator or "",
            "PROCESS_INDEX": str(self.index),
            "PROCESS_COUNT": str(self.count),
            "LOCAL_DEVICE": "" if self.local_device is None else str(self.local_device),
        }
        return {_PREFIX + name: value for name, value in values.items()}

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
        """What a launcher told this process, or None when it was started by hand."""
        if _PREFIX + "PROCESS_INDEX" not in environment:
            return None
        device = environment.get(_PREFIX + "LOCAL_DEVICE", "")
        return Rendezvous(
            environment[_PREFIX + "COORDINATOR"] or None,
            int(environment[_PREFIX + "PROCESS_INDEX"]),
            int(environment[_PREFIX + "PROCESS_COUNT"]),
            int(device) if device else None,
        )


def join() -> bool:
    """Join the other processes, if there are any; whether there are.  To be called before JAX looks for devices.

    BackendError when they do not come together.
    """
    import jax

    rendezvous = Rendezvous.from_environment()
    if rendezvous is None or rendezvous.count == 1:
        return False
    if not jax.distributed.is_initialized():
        _keep_gloo_off_stdout()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It would take SIGTERM away from the training loop, which finishes the step and saves.
        jax.config.update("jax_enable_preemption_service", False)
        _meet(rendezvous)
    return True


def _meet(rendezvous: Rendezvous) -> None:
    import jax

    from jaxllm.jax_backend.peers import JAX_SILENCE, watch_peers

    found: dict[str, Any] = {}
    if rendezvous.coordinator is not None:
        devices = None if rendezvous.local_device is None else [rendezvous.local_device]
        found = {
            "coordinator_address": rendezvous.coordinator,
            "num_processes": rendezvous.count,
            "process_id": rendezvous.index,
            "local_device_ids": devices,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**found, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=JAX_SILENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = rendezvous.coordinator or "the address that the TPU's metadata gives"
        raise BackendError(
            f"process {rendezvous.index} of {rendezvous.count} could not meet the others at {where} within {JOIN_SECONDS} s "
            f"({reason}); check that every process was started and can reach that address"
        ) from None
    watch_peers()


def _keep_gloo_off_stdout() -> None:
    """Move Python's standard output to a descriptor of its own: gloo writes a line for every communicator to descriptor 1."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def blame(error: BaseException | None) -> None:
    """End this process, saying why, when `error` comes from another process that is gone."""
    import jax

    from jaxllm.jax_backend import peers

    if jax.distributed.is_initialized():
        peers.blame(error)


def leave() -> None:
    """Leave the other processes (collective); after an error, tell them, since they may wait for this one."""
    import jax

    from jaxllm.jax_backend.peers import stop_watching

    if jax.distributed.is_initialized() and stop_watching(sys.exception()):
        jax.distributed.shutdown()


class SharedFlag:
    """A flag that any process may raise, which all learn at the same call, without waiting for the devices' newest work.

    What is raised at one call is answered at the next: by then the devices have come past it.
    """

    def __init__(self, mesh: Any) -> None:
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._highest = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: Any = None

    def __call__(self, raised: bool) -> bool:
        """Whether any process raised it at the call before this (collective)."""
        import jax

        flag = np.full(1, raised, np.int32)
        flags = jax.make_array_from_callback((self._sharding.mesh.size,), self._sharding, lambda _: flag)
        before, self._before = self._before, self._highest(flags)
        return before is not None and bool(before)
