"""The Sink protocol, and the fan-out to several of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, Self

from jaxllm.metrics.records import TrainRecord, ValidationRecord


class Sink(Protocol):
    """Where records go.  `open` comes first, `close` last, also when the run fails."""

    def open(self, total_steps: int, start_step: int) -> None:
        """A run of total_steps begins, or goes on after start_step steps: later records of an earlier attempt are void."""
        ...

    def train(self, record: TrainRecord) -> None:
        """A logging interval has ended."""
        ...

    def validation(self, record: ValidationRecord) -> None:
        """An evaluation has ended."""
        ...

    def message(self, text: str) -> None:
        """Something to tell the person, one line or more."""
        ...

    def close(self) -> None:
        """Write what is left and let go of files and the terminal; harmless when repeated."""
        ...


class Sinks:
    """A sink that hands everything to others, in order; none at all on processes that report nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def open(self, total_steps: int, start_step: int) -> None:
        for sink in self._sinks:
            sink.open(total_steps, start_step)

    def train(self, record: TrainRecord) -> None:
        for sink in self._sinks:
            sink.train(record)

    def validation(self, record: ValidationRecord) -> None:
        for sink in self._sinks:
            sink.validation(record)

    def message(self, text: str) -> None:
        for sink in self._sinks:
            sink.message(text)

    def close(self) -> None:
        with ExitStack() as stack:  # closes every one, also when one fails
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
