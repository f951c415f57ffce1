"""Whether the other processes of a run are still there.

A process that dies leaves the others in a collective that never ends, until JAX's own service aborts them with a stack trace.
Therefore every process says every few seconds that it lives, on the board that the coordinator (process 0) keeps, and looks at
what the others said.  When one of them has been silent for too long, or says that it leaves with an error, this process says
so in one sentence and ends.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import distributed as _jax_distributed  # the board has no public name; Orbax uses it, too

INTERVAL = 2.0
"""Seconds between two signs of life."""

SILENCE = 45.0
"""Seconds without a sign of life after which a process is lost."""

JAX_SILENCE = 300
"""The same for JAX's own service, which aborts the process; it is there for a process that can no longer look."""

LINGER = 3.0
"""Seconds that process 0, which keeps the board, stays for the others to read it."""

_SUSPICION = 3 * INTERVAL  # the same, once a collective has failed

_ALIVE, _LEFT = "jaxllm/alive/", "jaxllm/left/"


@dataclass
class _Sign:
    """The newest sign of life of a process, and when it was first seen here."""

    beat: str
    seen: float


class _Watch(threading.Thread):
    def __init__(self, board: Any, index: int, count: int) -> None:
        super().__init__(name="jaxllm-peers", daemon=True)
        self._board, self._index, self._count = board, index, count
        self._done = threading.Event()
        self._signs: dict[int, _Sign] = {}

    def run(self) -> None:
        beat = 0
        while not self._done.wait(INTERVAL if beat else 0.0):
            beat += 1
            try:
                self._board.key_value_set(f"{_ALIVE}{self._index}", str(beat), allow_overwrite=True)
                self._read()
            except jax.errors.JaxRuntimeError:
                continue  # without a coordinator JAX itself ends this process
            reason = self.lost(SILENCE)
            if reason and not self._done.is_set():
                end(reason, self._index)

    def _read(self) -> None:
        now = time.monotonic()
        for key, beat in self._board.key_value_dir_get(_ALIVE):
            other = int(key.rsplit("/", 1)[1])
            if other not in self._signs or self._signs[other].beat != beat:
                self._signs[other] = _Sign(beat, now)
        for key, reason in self._board.key_value_dir_get(_LEFT):
            self._signs[int(key.rsplit("/", 1)[1])] = _Sign(reason, -1.0)

    def lost(self, silence: float) -> str | None:
        """What is to be said about a process that left or has been silent for so many seconds; None when there is none."""
        now = time.monotonic()
        for other, sign in sorted(self._signs.items()):
            if other == self._index:
                continue
            if sign.seen < 0:
                return f"process {other} of {self._count} ended with an error: {sign.beat}"
            if now - sign.seen > silence:
                return f"process {other} of {self._count} has given no sign of life for {now - sign.seen:.0f} s"
        return None

    def leave(self, error: BaseException | None) -> bool:
        """Stop watching and, after an error, tell the others; whether all can part in peace."""
        self._done.set()
        if error is None:
            return True
        said = str(error).strip().splitlines() or [type(error).__name__]
        with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, too
            self._board.key_value_set(f"{_LEFT}{self._index}", said[0], allow_overwrite=True)
        return False


_watch: _Watch | None = None


def watch_peers() -> None:
    """Begin to watch, once the processes have met."""
    global _watch  # noqa: PLW0603 - as there is one set of processes
    _watch = _Watch(_jax_distributed.global_state.client, jax.process_index(), jax.process_count())
    _watch.start()


def stop_watching(error: BaseException | None) -> bool:
    """Stop; whether the processes may part as JAX wants them to, all together.

    After an error they may not: the others are waiting for something else.  This process tells them and, at its exit, does not
    wait for them.
    """
    if _watch is None or _watch.leave(error):
        return True
    atexit.register(_leave_at_once, jax.process_index())
    return False


def _leave_at_once(index: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(LINGER if index == 0 else 0.0)
    os._exit(1)


def end(reason: str, index: int) -> None:
    """End this process because of another."""
    sys.stderr.write(f"error: {reason}; see to it and go on from the newest checkpoint with --resume\n")
    _leave_at_once(index)


def blame(error: BaseException | None) -> None:
    """End this process, saying why, when `error` comes from a collective that another process is missing from."""
    if _watch is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return
    deadline = time.monotonic() + _SUSPICION + 2 * INTERVAL
    while time.monotonic() < deadline:
        reason = _watch.lost(_SUSPICION)
        if reason:
            end(reason, jax.process_index())
        time.sleep(INTERVAL / 4)
