"""`jaxllm plan FILE`: which model a run trains, how much compute that is, where it fits, and how to make it faster."""

from __future__ import annotations

from pathlib import Path

import click

from jaxllm.cli.options import handle_errors, run_file_options
from jaxllm.cli.reports import check_writable, write_json


@click.command()
@run_file_options
@click.option(
    "--chips",
    multiple=True,
    metavar="CHIPS",
    help="For example v5p:4x4x8, h100x8 or l4. May be repeated. Default: usual ones, of which those that fit are shown.",
)
@click.option(
    "--budget-hours", type=click.FloatRange(min=0, min_open=True), help="Chip-hours to spend: which model, on how many tokens?"
)
@click.option("--best", type=click.IntRange(min=1), default=3, show_default=True, help="Settings shown for each backend.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the whole plan to this file.")
@handle_errors
def plan(
    file: Path,
    overrides: tuple[str, ...],
    chips: tuple[str, ...],
    budget_hours: float | None,
    best: int,
    json_path: Path | None,
) -> None:
    """Plan the run that FILE describes; nothing is started and no device is needed.

    \b
    jaxllm plan configs/llama3-8b.yaml --chips v5p:2x2x4 --chips h100x16
    jaxllm plan configs/gpt2-124m.yaml --chips l4x1 --budget-hours 24
    """
    from jaxllm.cli.run_summary import resolve
    from jaxllm.config import load_run
    from jaxllm.errors import JaxllmError
    from jaxllm.families import check_sequence_length
    from jaxllm.planning import report
    from jaxllm.planning.devices import USUAL, parse_devices
    from jaxllm.planning.plan import make_plan

    check_writable(json_path)
    config = load_run(file, overrides).config
    asked = [parse_devices(each) for each in chips]
    model = resolve(config)
    check_sequence_length(model, config)
    made = make_plan(config, model, asked or [parse_devices(each) for each in USUAL], budget_hours)
    write_json(json_path, report.to_json(made))
    shown = made if asked else report.shortened(made)
    for line in report.lines(shown, best):
        click.echo(line)
    if not made.fits:
        raise JaxllmError(report.nothing_fits(made))
