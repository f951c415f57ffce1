"""`jaxllm train FILE`: run it, or resume it, on either backend, alone or in a group of processes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from jaxllm.cli.options import Host, handle_errors, host_options, run_file_options


@click.command()
@run_file_options
@click.option("--backend", type=click.Choice(["jax", "deepspeed"]), help="Overrides `backend` of the run file.")
@click.option("--processes", type=click.IntRange(min=1), help="Start this many processes on this machine, one per device.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint; start from the beginning if there is none.")
@click.option("--overwrite", is_flag=True, help="Delete the run that the run folder holds.")
@click.option(
    "--allow-changed",
    multiple=True,
    metavar="KEY",
    help="With --resume: let this key (or section) differ from the checkpoint's. May be repeated.",
)
@host_options
@handle_errors
def train(
    file: Path,
    overrides: tuple[str, ...],
    backend: str | None,
    processes: int | None,
    resume: bool,
    overwrite: bool,
    allow_changed: tuple[str, ...],
    host: Host,
) -> None:
    """Train the model that FILE describes.

    \b
    jaxllm train configs/quickstart.yaml
    jaxllm train configs/quickstart.yaml --backend deepspeed --processes 2
    jaxllm train configs/quickstart.yaml --resume
    srun jaxllm train configs/llama3-8b.yaml
    """
    from jaxllm.backend import (
        check_layout,
        create_backend,
        in_group,
        launch,
        launch_member,
        outer_group,
        wanted_processes,
    )
    from jaxllm.cli.run_summary import resolve
    from jaxllm.config import data_parallel, load_run, resolve_batch
    from jaxllm.errors import ConfigError
    from jaxllm.training import prepare, train

    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run and --overwrite deletes it; give one of them")
    overrides = (*overrides, f"backend={backend}") if backend else overrides
    loaded = load_run(file, overrides)
    config = loaded.config
    worker = in_group(config.backend)
    place = None if worker else outer_group(config.backend, *host)
    if place and processes:
        raise click.UsageError("--processes starts all processes of a run here, but this is one of several that were started")
    speaks = not worker and (place is None or place.index == 0)
    try:
        if not worker:
            check_layout(config, resolve(config), None)  # before the data is prepared, which may take its time
        plan = prepare(
            config,
            resume=resume,
            overwrite=overwrite,
            allow_changed=allow_changed,
            report=_say if speaks else _ignore,
            progress=speaks and sys.stderr.isatty(),
        )
        if place:
            sys.exit(launch_member(sys.argv[1:], place))
        if not worker:
            count = wanted_processes(config, processes)
            if config.backend == "deepspeed":  # one process for each device, so that the layout is known already
                check_layout(config, plan.run.model, count)
                resolve_batch(config, data_parallel(config.parallel, count))
            if count > 1:
                sys.exit(launch(config.backend, sys.argv[1:], count))
        train(plan, create_backend(config.backend), _resume_command(sys.argv[1:]))
    except ConfigError as error:
        raise loaded.place(error) from None


def _say(text: str) -> None:
    click.echo(text, err=True)


def _ignore(text: str) -> None:
    """Of a group of processes only the one that started them talks."""


def _resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with this run."""
    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join(["jaxllm", *kept, "--resume"])
