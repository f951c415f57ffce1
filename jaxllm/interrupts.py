"""SIGTERM and Ctrl-C as a wish to stop after the current step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class StopRequest:
    """While active, the first SIGTERM or SIGINT sets `requested`; the second acts as it would have without this."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
