from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import jaxllm
from jaxllm.metrics.records import TrainRecord, ValidationRecord
from jaxllm.metrics.sinks.console import ConsoleSink

TRAIN = TrainRecord(10, 2.5, 1e-3, 0.5, 12345.0, 0.25, 0.4123, 2**30, 4096, 12.0, 83.0)
VALIDATION = ValidationRecord.from_sums(100, 30.0, 10.0, 4.0, 0.5)
UNKNOWN = replace(TRAIN, tokens_per_second=None, model_tflops=None, mfu=None, memory_bytes=None, seconds_left=None)


def plain(*records: TrainRecord | ValidationRecord | str) -> list[str]:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream), "quickstart")
    sink.open(3000, 0)
    for record in records:
        if isinstance(record, TrainRecord):
            sink.train(record)
        elif isinstance(record, ValidationRecord):
            sink.validation(record)
        else:
            sink.message(record)
    sink.close()
    return stream.getvalue().splitlines()


def test_without_a_terminal_each_record_is_one_line_of_plain_text() -> None:
    rates = "12.3k tokens/s     0.25 TFLOP/s  MFU 41.2%    1.0 GiB  1m 23s left"
    assert plain(TRAIN, VALIDATION) == [
        f"step    10/3,000  loss   2.5000  lr 1.00e-03  gradient norm    0.500   {rates}",
        "step   100/3,000  validation loss 3.0000  perplexity 20.09  bits per byte 1.0820",
    ]


def test_columns_stay_in_place() -> None:
    lines = plain(
        TRAIN, replace(TRAIN, step=2990, loss=11.25, gradient_norm=123.4, tokens_per_second=987.0, model_tflops=123.0)
    )
    places = [[match.start() for match in re.finditer(r"loss|lr|gradient|tokens/s|TFLOP|MFU|GiB", line)] for line in lines]
    assert places[0] == places[1]
    assert len(places[0]) == 7


def test_unknown_numbers_are_left_out_and_broken_ones_are_shown() -> None:
    start = "step    10/3,000  loss   2.5000  lr 1.00e-03  gradient norm    0.500"
    assert plain(UNKNOWN) == [f"{start}       - tokens/s        - TFLOP/s"]
    (line,) = plain(replace(UNKNOWN, loss=math.nan, gradient_norm=math.inf))
    assert "loss      nan" in line
    assert "gradient norm      inf" in line


def test_messages_are_printed_as_they_are() -> None:
    long = "resume with: jaxllm train 'a [bold] file.yaml' --resume " + "--set training.steps=100 " * 8
    assert plain(long.rstrip(), "two\nlines") == [long.rstrip(), "two", "lines"]


def live(width: int) -> str:
    """The last picture of the live display, as text."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, color_system=None, _environ={})
    sink = ConsoleSink(console, "quickstart")
    sink.open(3000, 0)
    for step in range(10, 110, 10):
        sink.train(replace(TRAIN, step=step, loss=3.0 - step / 100))
    sink.validation(VALIDATION)
    shown = Console(file=io.StringIO(), width=width, height=30, _environ={})
    shown.print(sink._display())
    sink.close()
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_live_display_shows_every_number_whole(width: int) -> None:
    text = live(width)
    for expected in ("quickstart", "step 100/3,000", "1m 23s left", "2.0000", "1.00e-03", "0.500", "4.10k", "12.3k", "0.25",
                     "41.2%", "1.0 GiB", "█▇", "validation at step 100", "3.0000", "20.09", "1.0820", "gradient norm",
                     "learning rate", "model TFLOP/s"):  # fmt: skip
        assert expected in text
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_live_display_before_the_first_record() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    sink = ConsoleSink(console, "quickstart")
    sink.open(3000, 0)
    sink.close()
    assert isinstance(console.file, io.StringIO)
    assert "compiling" in console.file.getvalue()


def test_on_a_terminal_the_display_is_live_messages_stay_and_the_cursor_comes_back() -> None:
    script = (
        "from rich.console import Console; from jaxllm.metrics.records import TrainRecord\n"
        "from jaxllm.metrics.sinks.console import ConsoleSink\n"
        "sink = ConsoleSink(Console(), 'quickstart'); sink.open(30, 0); sink.message('run folder runs/quickstart')\n"
        "sink.train(TrainRecord(10, 2.5, 1e-3, 0.5, 12345.0, 0.25, None, 2**30, 4096, 12.0, 83.0)); sink.close()"
    )
    root = Path(jaxllm.__file__).parent.parent
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, env=environment, stdout=theirs, stdin=theirs) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            output += piece
        assert process.wait() == 0
    os.close(ours)
    text = output.decode()
    assert "run folder runs/quickstart" in text
    assert "step 10/30" in text
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert 0 <= hidden < shown
