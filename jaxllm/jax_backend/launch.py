"""Several JAX processes on this machine, each with its share of the CPU devices, joined over gloo.

Accelerators need none of this: one process drives all local devices, and a pod starts one process per host by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from jaxllm.jax_backend.distributed import Rendezvous

# How long the other workers may take to finish by themselves once one has failed: they are waiting for it in a collective.
GRACE_SECONDS = 5.0


def launch(argv: Sequence[str], processes: int) -> int:
    """Run `python -m jaxllm ARGV` in `processes` processes that form one run; the first failure's exit status, or 0.

    SIGTERM and SIGINT are passed on to every worker, which finishes its step and saves.  When one worker dies the others,
    who would wait for it for ever, are ended.
    """
    coordinator = f"127.0.0.1:{_free_port()}"
    workers = [_start(argv, Rendezvous(coordinator, index, processes)) for index in range(processes)]
    with _forwarding(workers):
        try:
            return _wait(workers)
        finally:
            _end(workers)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(argv: Sequence[str], rendezvous: Rendezvous) -> subprocess.Popen[bytes]:
    # In its own process group, so that Ctrl-C in a terminal reaches it once, from us, and not twice.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **rendezvous.environment()}
    return subprocess.Popen([sys.executable, "-m", "jaxllm", *argv], env=environment, start_new_session=True)


@contextmanager
def _forwarding(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, _: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """The status of the run: 0 when every worker ends with 0, else that of the first that does not."""
    while True:
        states = [worker.poll() for worker in workers]
        failed = [state for state in states if state]
        if failed:
            return _status(failed[0])
        if all(state == 0 for state in states):
            return 0
        time.sleep(0.05)


def _status(returncode: int) -> int:
    """A worker's status as a shell gives it: 128 + the signal that killed it."""
    return 128 - returncode if returncode < 0 else returncode


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    for signal_worker in (subprocess.Popen.terminate, subprocess.Popen.kill):
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            time.sleep(0.05)
        for worker in workers:
            if worker.poll() is None:
                signal_worker(worker)
        deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.wait()
