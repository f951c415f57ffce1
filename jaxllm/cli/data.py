"""`jaxllm data`: prepare, show and hash the data of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jaxllm.cli.options import handle_errors, run_file_options

if TYPE_CHECKING:
    from jaxllm.data.prepare import SplitName

_split = click.option(
    "--split", type=click.Choice(["train", "validation"]), default="train", show_default=True, help="Which documents."
)


@click.group()
def data() -> None:
    """Prepare, show and hash the data of a run file."""


@data.command()
@run_file_options
@handle_errors
def prepare(file: Path, overrides: tuple[str, ...]) -> None:
    """Tokenise the documents of FILE ahead of a run, and print what came out.

    A run does this by itself; use this where documents can be read but nothing is to be trained, for example on a login node.
    """
    from jaxllm.cli.data_view import print_counts
    from jaxllm.config import load_run
    from jaxllm.data.prepare import prepare as prepare_data

    config = load_run(file, overrides).config
    print_counts(prepare_data(config, progress=True), config)


@data.command()
@run_file_options
@click.option("--rows", type=click.IntRange(min=0), default=2, show_default=True, help="How many sequences to print.")
@click.option("--batch", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the first batch to print.")
@_split
@handle_errors
def show(file: Path, overrides: tuple[str, ...], rows: int, batch: int, split: SplitName) -> None:
    """Print the first sequences of a batch of FILE, decoded, with document boundaries, targets and weights."""
    from jaxllm.cli.data_view import print_counts, print_rows
    from jaxllm.config import load_run
    from jaxllm.data.prepare import prepare as prepare_data

    config = load_run(file, overrides).config
    prepared = prepare_data(config, progress=True)
    print_counts(prepared, config)
    print_rows(prepared, config, split, batch, rows)


@data.command(name="hash")
@run_file_options
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many global batches to read; fewer where the validation split ends.",
)
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the first batch.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that each read their own rows."
)
@_split
@handle_errors
def hash_(file: Path, overrides: tuple[str, ...], batches: int, start: int, processes: int, split: SplitName) -> None:
    """Print a SHA-256 of the exact token stream of FILE: inputs, targets, weights, positions and segments, in order.

    The digest is the same for every backend, mesh, number of processes and point of resuming, and differs as soon as one
    token does.
    """
    from jaxllm.config import load_run
    from jaxllm.data.prepare import prepare as prepare_data
    from jaxllm.data.stream_hash import batches_in, stream_hash

    config = load_run(file, overrides).config
    prepared = prepare_data(config, progress=True)
    count = batches_in(prepared, config, split, start, batches)
    digest = stream_hash(prepared, config, count, start, split, processes)
    click.echo(f"{digest}  {split} batches {start} to {start + count - 1}, {config.training.global_batch} sequences each")
