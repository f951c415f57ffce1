"""`jaxllm config`: check run files, show them with everything resolved, and print their schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import click

from jaxllm.cli.options import handle_errors, run_file_options

_devices = click.option(
    "--devices", type=click.IntRange(min=1), help="Devices to do the batch arithmetic for; default: the fewest the mesh allows."
)


@click.group()
def config() -> None:
    """Check and show run files, and print their schema."""


@config.command()
@run_file_options
@_devices
@handle_errors
def check(file: Path, overrides: tuple[str, ...], devices: int | None) -> None:
    """Check FILE without touching data or devices; every error is printed with its line."""
    from jaxllm.cli.run_summary import resolve, sentence, summarize
    from jaxllm.config import load_run

    run = load_run(file, overrides).config
    click.echo(sentence(file, run, summarize(run, resolve(run), devices)))


@config.command()
@run_file_options
@_devices
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: config and summary.")
@handle_errors
def show(file: Path, overrides: tuple[str, ...], devices: int | None, as_json: bool) -> None:
    """Print FILE with every default written out, and what it comes to.

    The output is itself a run file: the summary stands in its comments.
    """
    from jaxllm.cli.run_summary import resolve, summarize
    from jaxllm.config import load_run, write_yaml
    from jaxllm.run_folder import resolved

    run = load_run(file, overrides).config
    model = resolve(run)
    summary = summarize(run, model, devices)
    if as_json:
        click.echo(json.dumps({"config": resolved(run, model), "summary": summary.as_dict()}, indent=2))
        return
    width = max(len(label) for label, _ in summary.lines())
    for label, text in summary.lines():
        click.echo(f"# {label.ljust(width)}  {text}")
    click.echo(write_yaml(resolved(run, model)), nl=False)


@config.command()
@handle_errors
def schema() -> None:
    """Print the JSON Schema of run files, for editors.

    \b
    jaxllm config schema > run.schema.json
    and as the first line of a run file, for VS Code's YAML extension and others that use yaml-language-server:
    # yaml-language-server: $schema=run.schema.json
    """
    from jaxllm.families.run_schema import run_file_schema

    click.echo(json.dumps(run_file_schema(), indent=2))
