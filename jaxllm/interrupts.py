"""SIGTERM and Ctrl-C as a wish to stop after the current step."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Self

_SAME_WISH_SECONDS = 1.0


class StopRequest:
    """While active, the first SIGTERM or SIGINT sets `requested`; a second acts as it would have without this.

    One wish can arrive twice at once, from a cluster that signals every process of a job and from the process that started this
    one, which passes it on: what comes within a second is the same wish.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since > _SAME_WISH_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
