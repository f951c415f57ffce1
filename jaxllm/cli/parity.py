"""`jaxllm parity FILE`: how far the two backends are apart, on the user's own run file and data."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from jaxllm.cli.options import handle_errors
from jaxllm.cli.reports import check_writable, write_json

if TYPE_CHECKING:
    from jaxllm.config.schema import Precision
    from jaxllm.parity.report import Terminal
    from jaxllm.parity.results import Measurement, Report
    from jaxllm.parity.subject import Subject

_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    level: Literal["fp64", "fp32", "bf16", "all"]
    steps: int
    stages: tuple[int, ...]
    processes: int
    full: bool
    json_out: Path | None
    html_out: Path | None
    find: bool
    model: Path | None

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """fp64 first: it tells a mistake from rounding."""
        return ("fp64", "fp32", "bf16") if self.level == "all" else (self.level,)


def _stages(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        stages = tuple(dict.fromkeys(int(stage) for stage in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of ZeRO stages such as 0,1,2,3") from None
    if not set(stages) <= set(_STAGES):
        raise click.BadParameter(f"{value!r} names a stage that ZeRO does not have; it has 0, 1, 2 and 3")
    return stages


@click.command()
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the run file. May be repeated.")
@click.option("--level", type=click.Choice(["fp64", "fp32", "bf16", "all"]), default="all", help="Numbers to compute in.")
@click.option("--steps", type=click.IntRange(min=2), default=100, show_default=True, help="Steps of every run.")
@click.option("--stages", default="0,1,2,3", show_default=True, callback=_stages, help="ZeRO stages of the fp32 runs.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of the DeepSpeed runs.")
@click.option(
    "--full", is_flag=True, help="Also JAX meshes of 8 virtual CPU devices, and switches of mesh, processes and stage."
)
@click.option("--json", "json_out", metavar="OUT", type=click.Path(path_type=Path), help="Write the report as JSON.")
@click.option("--html", "html_out", metavar="OUT", type=click.Path(path_type=Path), help="Write the report as one HTML page.")
@click.option("--find", is_flag=True, help="Name the first operation at which the backends depart from each other.")
@click.option("--model", "model", metavar="FOLDER", type=click.Path(path_type=Path), help="Compare a Hugging Face checkpoint.")
@handle_errors
def parity(file: Path | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Measure how far JAX and PyTorch + DeepSpeed are apart on the run of FILE.  Exit status 1 when a bound is broken.

    \b
    jaxllm parity configs/quickstart.yaml --level fp64
    jaxllm parity configs/quickstart.yaml --stages 0,2 --processes 2 --html parity.html
    jaxllm parity configs/quickstart.yaml --find
    jaxllm parity --model my-checkpoint/
    """
    from jaxllm.backend import require_deepspeed

    wanted = Options(**options)
    if (file is None) == (wanted.model is None):
        raise click.UsageError("give a run FILE, or --model FOLDER")
    if wanted.find and (wanted.model or wanted.html_out):
        raise click.UsageError("--find belongs to a run FILE, and writes no HTML")
    require_deepspeed("jaxllm parity")
    check_writable(wanted.json_out, wanted.html_out)
    _stay_on_the_cpu()
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="jaxllm-parity-") as folder:
        if file is None:
            report = _compare_model(wanted.model or Path())
        else:
            subject = _subject(file, overrides, Path(folder))
            if wanted.find:
                sys.exit(_find(subject, wanted))
            report = _compare(subject, wanted, Path(folder))
    _write(report, wanted)
    sys.exit(0 if report.passed else 1)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the runs and removes what they wrote, as Ctrl-C does, instead of leaving both behind."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stay_on_the_cpu() -> None:
    """For this process and those it starts: whatever accelerators there are, both sides compute on the CPU.

    Its arithmetic is the same for both, so that what differs is the models and not two ways to multiply matrices; and it can
    be split into as many devices as a mesh needs.
    """
    os.environ.update({"JAX_PLATFORMS": "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})


def _subject(file: Path, overrides: tuple[str, ...], folder: Path) -> Subject:
    from jaxllm.config import load_run
    from jaxllm.parity.subject import examine

    return examine(load_run(file, overrides).config, folder, progress=True)


def _compare(subject: Subject, wanted: Options, folder: Path) -> Report:
    from rich.console import Console

    from jaxllm.parity.ladder import Extent, check_fits, climb
    from jaxllm.parity.report import Terminal
    from jaxllm.parity.runs import MAX_STATE_BYTES, MAX_STATES, Runs, state_spacing

    run, steps = subject.run, wanted.steps
    extent = Extent(wanted.precisions, wanted.stages, wanted.processes, wanted.full)
    terminal = Terminal(Console())
    terminal.begin(f"{run.config.name}: {run.model.family}, {run.model.parameters:,} parameters, runs of {steps} steps")
    with _progress(terminal) as say:
        runs = Runs(run, folder / "runs", steps, report=say)
        notes = [*subject.notes, *check_fits(runs, extent)]
        spacing = state_spacing(run.model.parameters, extent.precisions[0], steps)
        if spacing > 1:
            kept = f"a run saves at most {MAX_STATES} states of at most {MAX_STATE_BYTES / 1e9:g} GB in all"
            notes.append(f"parameters are compared every {spacing} steps: {kept}")
        return _show(terminal, climb(subject, runs, extent), run.config.name, run.model.family, steps, tuple(notes))


def _compare_model(folder: Path) -> Report:
    from rich.console import Console

    from jaxllm.parity.checkpoint import Checkpoint
    from jaxllm.parity.report import Terminal

    checkpoint, terminal = Checkpoint.open(folder), Terminal(Console())
    family, head = checkpoint.model.family, checkpoint.model.spec.head.kind
    terminal.begin(f"{folder}: {family} for {head}, JAX against transformers")
    return _show(terminal, checkpoint.compare(), folder.name, family, 0, checkpoint.notes)


def _show(
    terminal: Terminal, measurements: Iterable[Measurement], name: str, family: str, steps: int, notes: tuple[str, ...]
) -> Report:
    """Show every check as it comes, and make the report of all."""
    from jaxllm.metrics.environment import describe_machine, package_versions
    from jaxllm.parity.results import Check, Report

    for note in notes:
        terminal.note(note)
    checks, curves = [], {}
    for measurement in measurements:
        if isinstance(measurement, Check):
            checks.append(measurement)
            terminal.check(measurement)
        else:
            # A reference run is yielded once for every comparison with it.
            curves[measurement.level, measurement.precision, measurement.name, measurement.reference] = measurement
    versions, machine = package_versions(), describe_machine()
    report = Report(name, family, steps, versions, machine, notes, tuple(checks), tuple(curves.values()))
    terminal.finish(report)
    return report


@contextmanager
def _progress(terminal: Terminal) -> Iterator[Callable[[str], None]]:
    """Tells which run is under way: below the table in a terminal, else as lines on stderr."""
    with terminal.console.status("comparing") if terminal.console.is_terminal else nullcontext() as status:

        def say(text: str) -> None:
            terminal.flush()
            if status is not None:
                status.update(f"running {text}")
            else:
                click.echo(f"running {text}", err=True)

        yield say


def _find(subject: Subject, wanted: Options) -> int:
    """Name the first departure; the exit status."""
    from rich.console import Console

    from jaxllm.errors import JaxllmError
    from jaxllm.parity.find import find

    precision = wanted.precisions[0]
    if precision == "bf16":
        raise JaxllmError("--find cannot tell an error from rounding in bf16; use --level fp64 or fp32")
    console = Console()
    for note in subject.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    finding = find(subject.in_precision(precision), subject.data, precision)
    console.print(finding)
    write_json(wanted.json_out, finding.to_json())
    return 0 if finding.agrees else 1


def _write(report: Report, wanted: Options) -> None:
    write_json(wanted.json_out, report.to_json())
    if wanted.html_out is not None:
        from jaxllm.parity.html import html_report

        wanted.html_out.write_text(html_report(report), encoding="utf-8")
