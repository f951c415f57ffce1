"""`jaxllm compile FILE --topology v5p:4x4x8`: the real training step, compiled for TPUs that need not be there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from jaxllm.cli.options import handle_errors, run_file_options
from jaxllm.cli.reports import check_writable, write_json


@click.command(name="compile")
@run_file_options
@click.option("--topology", required=True, metavar="NAME", help="For example v5e:8x8, v6e:4x4, v5p:4x4x8, tpu7x:2x2x1.")
@click.option("--slices", type=click.IntRange(min=1), default=1, show_default=True, help="Slices of that topology.")
@click.option("--json", "json_out", metavar="OUT", type=click.Path(path_type=Path), help="Write the report as JSON.")
@click.option("--keep", metavar="FOLDER", type=click.Path(path_type=Path), help="Keep what the compiler writes.")
@click.option("--tune", is_flag=True, help="Search mesh, remat, micro-batch and kernel blocks for the fastest step that fits.")
@click.option("--trials", type=click.IntRange(min=1), default=16, show_default=True, help="Compilations of --tune.")
@click.option("--no-remedies", is_flag=True, help="When the step does not fit, do not look for changes that make it fit.")
@handle_errors
def compile(  # noqa: A001 - the verb's name
    file: Path,
    overrides: tuple[str, ...],
    topology: str,
    slices: int,
    json_out: Path | None,
    keep: Path | None,
    tune: bool,
    trials: int,
    no_remedies: bool,
) -> None:
    """Compile the training step of FILE for a TPU topology, without a TPU: memory, FLOPs, communication, predicted speed.

    Exit status 1 when the step does not fit.

    \b
    jaxllm compile configs/llama3-8b.yaml --topology v5p:2x2x4
    jaxllm compile configs/llama3-8b.yaml --topology v6e:4x4 --set training.micro_batch=2 --json report.json
    jaxllm compile configs/llama3-8b.yaml --topology v6e:4x4 --tune
    """
    from jaxllm.config import load_run
    from jaxllm.planning.tpu.compiler import require_libtpu
    from jaxllm.planning.tpu.remedies import find_remedies
    from jaxllm.planning.tpu.study import study
    from jaxllm.planning.tpu.text import lines, remedy_lines, trial_lines
    from jaxllm.planning.tpu.topology import parse_topology
    from jaxllm.planning.tpu.tuning import tune as search

    where = parse_topology(topology, slices)
    require_libtpu()
    check_writable(json_out)
    config = load_run(file, overrides).config
    if tune:
        found = search(config, where, trials=trials, report=_say)
        _print(trial_lines(found, where))
        write_json(json_out, {"topology": str(where), "trials": [trial.to_json() for trial in found]})
        sys.exit(0 if any(trial.study is not None and trial.study.fits for trial in found) else 1)
    _say(f"compiling {config.name} for {where}")
    result = study(config, where, keep=keep)
    _print(lines(result))
    remedies = [] if result.fits or no_remedies else find_remedies(config, where, report=_say)
    if not result.fits and not no_remedies:
        _print(remedy_lines(remedies, where))
    write_json(json_out, {**result.to_json(), "remedies": [remedy.to_json() for remedy in remedies]})
    sys.exit(0 if result.fits else 1)


def _print(text: Any) -> None:
    for line in text:
        click.echo(line)


def _say(text: str) -> None:
    click.echo(text, err=True)
