"""TensorBoard events below the run folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.metrics.records import TrainRecord, ValidationRecord

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class TensorBoardSink:
    """Scalars `train/KEY` and `validation/KEY` of every record; one event file per start of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def open(self, total_steps: int, start_step: int) -> None:  # noqa: ARG002
        with _torch_hidden():
            from tensorboardX import SummaryWriter

        # purge_step: TensorBoard hides the events of an earlier attempt from the first step that is done again.  The suffix
        # keeps the files of two starts within one second apart.
        suffix = f".{start_step}"
        self._writer = SummaryWriter(str(self._folder), purge_step=start_step + 1, flush_secs=10, filename_suffix=suffix)

    def train(self, record: TrainRecord) -> None:
        self._write(record.to_json())

    def validation(self, record: ValidationRecord) -> None:
        self._write(record.to_json())

    def message(self, text: str) -> None:
        """Messages are for people."""

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            raise RuntimeError(f"{self._folder} is not open")
        step, split = line.pop("step"), line.pop("split")
        for key, value in line.items():
            if value is not None:
                self._writer.add_scalar(f"{split}/{key}", value, step)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Importing tensorboardX imports torch wherever it is installed, which a JAX run must not, and scalars do not need."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError, which tensorboardX handles
    try:
        yield
    finally:
        del sys.modules["torch"]
