"""`jaxllm bench FILE`: how fast a run file trains on this machine, on either backend."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxllm.cli.options import handle_errors, run_file_options
from jaxllm.cli.reports import check_writable, write_json

if TYPE_CHECKING:
    from jaxllm.benchmarking import Measurement


@click.command()
@run_file_options
@click.option("--backend", type=click.Choice(["jax", "deepspeed"]), help="Overrides `backend` of the run file.")
@click.option("--processes", type=click.IntRange(min=1), help="Start this many processes on this machine, one per device.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Steps of each of two measurements.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Steps after the first, not measured.")
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers to this file.")
@click.option(
    "--profile", type=click.Path(path_type=Path, file_okay=False), help="Write a trace of a few steps into this folder."
)
@handle_errors
def bench(
    file: Path,
    overrides: tuple[str, ...],
    backend: str | None,
    processes: int | None,
    steps: int,
    warmup: int,
    out: Path | None,
    profile: Path | None,
) -> None:
    """Measure how fast FILE trains here, without leaving a run behind.

    \b
    jaxllm bench configs/quickstart.yaml
    jaxllm bench configs/quickstart.yaml --backend deepspeed --processes 2 --json speed.json
    jaxllm bench configs/quickstart.yaml --profile trace     # open trace/ with TensorBoard or Perfetto
    """
    from jaxllm.backend import check_layout, create_backend, in_group, launch, wanted_processes
    from jaxllm.benchmarking import measure
    from jaxllm.cli.run_summary import resolve
    from jaxllm.config import load_run
    from jaxllm.errors import ConfigError
    from jaxllm.training import prepare_run

    check_writable(out)
    overrides = (*overrides, f"backend={backend}") if backend else overrides
    loaded = load_run(file, overrides)
    config = loaded.config
    worker = in_group(config.backend)
    try:
        if not worker:
            check_layout(config, resolve(config), None)
        run, data = prepare_run(config, progress=not worker and sys.stderr.isatty())
        if not worker:
            count = wanted_processes(config, processes)
            check_layout(config, run.model, count if config.backend == "deepspeed" else None)
            if count > 1:
                sys.exit(launch(config.backend, sys.argv[1:], count))
        measured = measure(run, data, create_backend(config.backend), steps=steps, warmup=warmup, profile=profile)
    except ConfigError as error:
        raise loaded.place(error) from None
    if measured is not None:
        click.echo(_table(config.backend, run.model.family, run.model.parameters, measured))
        write_json(out, _report(file, overrides, measured))
        if profile is not None:
            click.echo(f"trace: {profile} (TensorBoard's profile plugin and https://ui.perfetto.dev open it)")


def _report(file: Path, overrides: tuple[str, ...], measured: Measurement) -> dict[str, Any]:
    from jaxllm.metrics.environment import describe_environment

    numbers = dataclasses.asdict(measured)
    environment = describe_environment(numbers.pop("device"))
    return {"run_file": str(file), "set": list(overrides), "measured": numbers, "environment": environment}


def _table(backend: str, family: str, parameters: int, measured: Measurement) -> str:
    from jaxllm.metrics.format import count, memory

    split = measured.split
    spread = f"({_milliseconds(measured.fastest)} to {_milliseconds(measured.slowest)})"
    rows = [
        ("backend", f"{backend}, {family} of {count(parameters)} parameters"),
        ("step", f"{_milliseconds(measured.step_seconds)} {spread}"),
        (
            "of a step waited for",
            f"data {_milliseconds(split.data)}, step {_milliseconds(split.step)}, host {_milliseconds(split.host)}",
        ),
        ("tokens/s", count(measured.tokens_per_second)),
        ("model TFLOP/s", f"{measured.model_tflops:.3g}" + (f", MFU {measured.mfu:.1%}" if measured.mfu else "")),
        ("peak memory", "unknown" if measured.memory_bytes is None else memory(measured.memory_bytes)),
        ("first step", f"after {measured.start_seconds:.1f} s, of which compiling {measured.compile_seconds:.1f} s"),
        ("loss", f"{measured.losses[0]:.4f} at the first step, {measured.losses[-1]:.4f} at step {len(measured.losses)}"),
    ]
    return "\n".join(f"{name:<21} {value}" for name, value in rows)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
