"""The terminal: a live display where there is one, plain aligned lines in a pipe or a log file."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxllm.metrics import format as show
from jaxllm.metrics.records import TrainRecord, ValidationRecord

_SPARKLINE_WIDTH = 30
_WIDE = 96  # columns that the numbers need to stand four in a row
_REFRESH_PER_SECOND = 2  # enough for a clock; each refresh takes time from the steps


class ConsoleSink:
    """Shows records on a rich console."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._total_steps = 0
        self._step = 0
        self._begun = time.monotonic()
        self._losses: list[float] = []
        self._curve = ""
        self._train: TrainRecord | None = None
        self._validation: ValidationRecord | None = None
        self._live: Live | None = None

    def open(self, total_steps: int, start_step: int) -> None:
        self._total_steps, self._step = total_steps, start_step
        self._begun = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._display, refresh_per_second=_REFRESH_PER_SECOND)
            self._live.start(refresh=True)

    def train(self, record: TrainRecord) -> None:
        self._step, self._train = record.step, record
        if self._live is not None:
            self._losses.append(record.loss)
            self._curve = show.sparkline(self._losses, _SPARKLINE_WIDTH)
        else:
            self._line(train_line(record, self._total_steps))

    def validation(self, record: ValidationRecord) -> None:
        self._step, self._validation = max(self._step, record.step), record
        if self._live is None:
            self._line(validation_line(record, self._total_steps))

    def message(self, text: str) -> None:
        self._line(text)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, text: str) -> None:
        # Not wrapped at 80 columns where the output is no terminal: one record is one line.
        self._console.print(text, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def _display(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self._train is not None:
            parts.append(self._numbers(self._train))
        else:
            parts.append(Text("compiling and running the first steps", style="dim"))
        if self._validation is not None:
            parts.append(_validation_text(self._validation))
        return Group(*parts)

    def _progress(self) -> RenderableType:
        left = self._train.seconds_left if self._train is not None else None
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_column(no_wrap=True, justify="right")
        elapsed = show.duration(time.monotonic() - self._begun)
        row.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=max(self._total_steps, 1), completed=self._step),
            Text(f"step {self._step:,}/{self._total_steps:,}"),
            Text(f"{elapsed} gone" if left is None else f"{elapsed} gone, {show.duration(left)} left", style="cyan"),
        )
        return row

    def _numbers(self, record: TrainRecord) -> RenderableType:
        columns = 4 if self._console.width >= _WIDE else 2
        grid = Table.grid(padding=(0, 2))
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(no_wrap=True, justify="right", min_width=8)
        shown = [
            ("loss", f"{record.loss:.4f}"),
            ("learning rate", f"{record.learning_rate:.2e}"),
            ("gradient norm", f"{record.gradient_norm:.3f}"),
            ("tokens", show.count(record.tokens)),
            ("tokens/s", "-" if record.tokens_per_second is None else show.count(record.tokens_per_second)),
            ("model TFLOP/s", "-" if record.model_tflops is None else f"{record.model_tflops:.3g}"),
            ("MFU", "-" if record.mfu is None else f"{record.mfu:.1%}"),
            ("memory", "-" if record.memory_bytes is None else show.memory(record.memory_bytes)),
        ]
        for start in range(0, len(shown), columns):
            row = shown[start : start + columns]
            grid.add_row(*(cell for label, value in row for cell in (label, Text(value, style="bold"))))
        return Group(grid, Text.assemble(("loss so far  ", "dim"), (self._curve, "green")))


def train_line(record: TrainRecord, total_steps: int) -> str:
    """A training record as one line whose columns stay in place."""
    width = len(f"{total_steps:,}")
    fields = [
        f"step {record.step:>{width},}/{total_steps:,}",
        f"loss {record.loss:8.4f}",
        f"lr {record.learning_rate:.2e}",
        f"gradient norm {record.gradient_norm:8.3f}",
    ]
    # The first report has no rates yet; its columns stay.
    fields.append(f"{'-' if record.tokens_per_second is None else show.count(record.tokens_per_second):>6} tokens/s")
    fields.append(f"{'-' if record.model_tflops is None else format(record.model_tflops, '.3g'):>7} TFLOP/s")
    if record.mfu is not None:
        fields.append(f"MFU {record.mfu:5.1%}")
    if record.memory_bytes is not None:
        fields.append(f"{show.memory(record.memory_bytes):>9}")
    if record.seconds_left is not None:
        fields.append(f"{show.duration(record.seconds_left)} left")
    return "  ".join(fields)


def validation_line(record: ValidationRecord, total_steps: int) -> str:
    """A validation record as one line, under the columns of the training lines."""
    width = len(f"{total_steps:,}")
    fields = [
        f"step {record.step:>{width},}/{total_steps:,}",
        f"validation loss {record.loss:.4f}",
    ]
    if record.perplexity is not None:
        fields.append(f"perplexity {record.perplexity:.4g}")
    if record.bits_per_byte is not None:
        fields.append(f"bits per byte {record.bits_per_byte:.4f}")
    fields += [f"{name} {value:.4f}" for name, value in record.measures.items()]
    return "  ".join(fields)


def _validation_text(record: ValidationRecord) -> Text:
    parts = [(f"validation at step {record.step:,}  loss ", "dim"), (f"{record.loss:.4f}", "bold magenta")]
    if record.perplexity is not None:
        parts += [("  perplexity ", "dim"), (f"{record.perplexity:.4g}", "bold")]
    if record.bits_per_byte is not None:
        parts += [("  bits per byte ", "dim"), (f"{record.bits_per_byte:.4f}", "bold")]
    for name, value in record.measures.items():
        parts += [(f"  {name} ", "dim"), (f"{value:.4f}", "bold")]
    return Text.assemble(*parts)
