"""Several JAX processes on this machine, each with its share of the CPU devices, joined over gloo.

Accelerators need none of this: one process drives all local devices, and a pod starts one process per host by itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO

from jaxllm.jax_backend.distributed import Rendezvous

# How long the other workers may take to end by themselves once one has failed: they may be about to say the same, or be
# waiting for it in a collective, for ever.
GRACE_SECONDS = 5.0

_POLL_SECONDS = 0.05

# What JAX writes before the stack trace when it aborts a process that has lost the coordinator.
_ABORTED = "Polled an error from coordination service"

PROCESS_0_IS_GONE = (
    "error: process 0, where the others meet, has ended or cannot be reached; see to it and go on from the newest checkpoint "
    "with --resume"
)


@dataclass
class _Worker:
    """A process of the run.  errors: what it says on standard error, but for process 0, who speaks for itself."""

    index: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None

    @property
    def status(self) -> int | None:
        """Its exit status as a shell gives it (128 + the signal that killed it), None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


def launch(argv: Sequence[str], processes: int) -> int:
    """Run `jaxllm ARGV` in `processes` processes that form one run; 0, or the exit status of the first that fails.

    Only process 0 writes to the terminal; what another one says before it fails is shown when process 0 has not failed too.
    SIGTERM and SIGINT are passed on to every worker, which finishes its step and saves.  When one worker dies, the others,
    who would wait for it for ever, are ended.
    """
    return run_workers((sys.executable, "-m", "jaxllm", *argv), processes)


def run_workers(command: Sequence[str], processes: int) -> int:
    """`launch` of any command."""
    coordinator = f"127.0.0.1:{_free_port()}"
    return _run(command, [Rendezvous(coordinator, index, processes) for index in range(processes)], {"JAX_PLATFORMS": "cpu"})


def launch_one(argv: Sequence[str], rendezvous: Rendezvous) -> int:
    """Run `jaxllm ARGV` as the one process of a run that is to be here, the others being started elsewhere; as `launch`.

    It is a process of its own so that there is somebody left to say what happened when JAX aborts it, as it does when
    process 0 is gone.
    """
    return _run((sys.executable, "-m", "jaxllm", *argv), [rendezvous], {})


def _run(command: Sequence[str], places: Sequence[Rendezvous], environment: Mapping[str, str]) -> int:
    with ExitStack() as stack:
        workers = [_start(stack, command, place, environment) for place in places]
        stack.callback(_end, workers)
        with _forwarding(workers):
            return _wait(workers)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(stack: ExitStack, command: Sequence[str], rendezvous: Rendezvous, environment: Mapping[str, str]) -> _Worker:
    environment = {**os.environ, **environment, **rendezvous.environment()}
    errors = stack.enter_context(tempfile.TemporaryFile()) if rendezvous.index else None  # noqa: SIM115 - the stack closes it
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if rendezvous.index else None,
        stderr=errors,
        # In a session of its own Ctrl-C in a terminal reaches it once, from us, and not twice.
        start_new_session=True,
        preexec_fn=_die_with_launcher,  # noqa: PLW1509 - safe: the launcher has one thread
    )
    return _Worker(rendezvous.index, process, errors)


def _die_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher is killed, so that the run is saved and does not go on unseen."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


@contextmanager
def _forwarding(workers: Sequence[_Worker]) -> Iterator[None]:
    def forward(number: int, _: FrameType | None) -> None:
        for worker in workers:
            if worker.status is None:
                worker.process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[_Worker]) -> int:
    """The status of the run: 0 when every worker ends with 0, else that of the first that does not."""
    while not (failed := [worker for worker in workers if worker.status]):
        if all(worker.status == 0 for worker in workers):
            return 0
        time.sleep(_POLL_SECONDS)
    first = failed[0]
    _until_ended(workers, GRACE_SECONDS)
    if first.index and (len(workers) == 1 or not workers[0].status):
        _report(first)
    return first.status or 0


def _report(worker: _Worker) -> None:
    """Say what a worker other than process 0 said before it failed."""
    said = ""
    if worker.errors is not None:
        worker.errors.seek(0)
        said = worker.errors.read().decode(errors="replace").strip()
    if _ABORTED in said:
        said = said.split(_ABORTED)[0].rpartition("\n")[0]
        said = f"{said}\n{PROCESS_0_IS_GONE}".strip()
    for line in (said or f"ended with status {worker.status} without a word").splitlines():
        sys.stderr.write(f"[process {worker.index}] {line}\n")


def _until_ended(workers: Sequence[_Worker], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(worker.status is None for worker in workers):
        time.sleep(_POLL_SECONDS)


def _end(workers: Sequence[_Worker]) -> None:
    """End what still runs: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in workers:
            if worker.status is None:
                worker.process.send_signal(number)
        _until_ended(workers, GRACE_SECONDS)
    for worker in workers:
        worker.process.wait()
