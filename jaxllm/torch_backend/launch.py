"""Starting the worker processes of a run on this machine, through torch's elastic launcher.

The launcher's own way with signals (kill after 30 seconds, then a traceback) is not what a person who presses Ctrl-C wants.
It therefore runs in a thread, where it installs no handlers, while this process passes SIGTERM and SIGINT on to the workers
and waits for them to finish their step, save and exit.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from jaxllm.torch_backend.rendezvous import RUN_ID_PREFIX, in_group

__all__ = ["in_group", "launch", "local_devices", "run_workers"]

_FORWARDED = (signal.SIGTERM, signal.SIGINT)


def local_devices() -> int:
    """Accelerators of this machine, each of which gets a process of its own; 1 when there is only the CPU."""
    import torch

    return torch.cuda.device_count() or 1


def launch(argv: list[str], processes: int) -> int:
    """Run `python -m jaxllm ARGV` in `processes` workers that form one group; returns the exit status of `run_workers`."""
    return run_workers([sys.executable, "-m", "jaxllm", *argv], processes)


def run_workers(command: list[str], processes: int) -> int:
    """Run a command in `processes` workers that form one group.

    Rank 0 writes to this terminal.  What the others wrote to stderr is shown only when one of them fails.  The status is 0
    when every worker's is, else that of the worker that failed first (128 + signal for one that was killed).
    """
    with tempfile.TemporaryDirectory(prefix="jaxllm-workers-") as logs, _worker_environment(processes):
        agent = _Agent(command, processes, Path(logs))
        with _forwarding(agent):
            agent.start()
            while agent.is_alive():
                agent.join(timeout=0.1)
                agent.forward_pending()
        return agent.status()


class _Agent(threading.Thread):
    """The elastic agent in its thread."""

    def __init__(self, command: list[str], processes: int, logs: Path) -> None:
        super().__init__(name="elastic-agent", daemon=True)
        self._command = command
        self._processes = processes
        self._logs = logs
        self._run_id = f"{RUN_ID_PREFIX}{uuid.uuid4().hex}"
        self._pending: list[signal.Signals] = []
        self._failures: Mapping[int, Any] = {}
        self._first_failure: int | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        _quiet_elastic_logs()
        others = dict.fromkeys(range(1, self._processes), Std.ALL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._processes,
            run_id=self._run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(self._logs), redirects=others or Std.NONE),
        )
        try:
            elastic_launch(config, self._command[0])(*self._command[1:])
        except ChildFailedError as error:
            self._failures = error.failures
            self._first_failure = _first(error.failures, error.get_first_failure()[0])
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error

    def signal_workers(self, number: signal.Signals) -> None:
        """Pass a signal on, or keep it until there is a worker to pass it to."""
        workers = list(self._workers())
        for worker in workers:
            try:
                worker.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if not workers:
            self._pending.append(number)

    def forward_pending(self) -> None:
        """Pass on signals that came before the workers did."""
        pending, self._pending = self._pending, []
        for number in pending:
            self.signal_workers(number)

    def _workers(self) -> Iterator[psutil.Process]:
        for child in psutil.Process().children():
            try:
                if child.environ().get("TORCHELASTIC_RUN_ID") == self._run_id:
                    yield child
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue

    def status(self) -> int:
        """The exit status, after the reason of a failure that rank 0 did not tell has been written to stderr."""
        if self._error is not None:
            raise self._error
        if self._first_failure is None:
            return 0
        code = int(self._failures[self._first_failure].exitcode)
        if code < 0:
            sys.stderr.write(_killed(self._first_failure, -code))
        elif self._first_failure != 0:
            sys.stderr.write(self._last_words(self._first_failure))
        return code if code >= 0 else 128 - code

    def _last_words(self, rank: int) -> str:
        """What a rank other than 0 wrote to stderr, unless it is a sentence that rank 0, which failed as well, has told."""
        file = next(self._logs.glob(f"**/{rank}/stderr.log"), None)
        text = "" if file is None else file.read_text(errors="replace")
        rank_0 = self._failures.get(0)
        if rank_0 is not None and rank_0.exitcode > 0 and "Traceback" not in text:
            return ""
        return "".join(f"[rank {rank}] {line}\n" for line in text.splitlines()) or f"[rank {rank}] ended without a word\n"


def _first(failures: Mapping[int, Any], earliest: int) -> int:
    """The rank whose failure is the cause: one that was killed, since the others fail for missing it; else the earliest."""
    return next((rank for rank, failure in sorted(failures.items()) if failure.exitcode == -signal.SIGKILL), earliest)


def _killed(rank: int, number: int) -> str:
    """What to tell of a worker that could not tell anything itself."""
    memory = ", as Linux does when memory runs out" if number == signal.SIGKILL else ""
    return (
        f"error: process {rank} of the run was killed by {signal.Signals(number).name}{memory}, and the others ended with it; "
        "go on from the newest checkpoint with --resume\n"
    )


def _quiet_elastic_logs() -> None:
    """The agent reports a failing worker several times over; the worker has said why, and `launch` returns its status."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _worker_environment(processes: int) -> Iterator[None]:
    """What the workers inherit: threads shared fairly, and JAX (the data pipeline may import it) kept off the accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "JAX_PLATFORMS": "cpu"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _forwarding(agent: _Agent) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT go to the workers instead of ending this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
        agent.signal_workers(signal.Signals(number))

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
