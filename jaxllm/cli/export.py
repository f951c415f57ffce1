"""`jaxllm export RUN OUT`: a folder that transformers loads as it is."""

from __future__ import annotations

from pathlib import Path

import click

from jaxllm.cli.options import handle_errors


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint to export; default: the newest.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float64"]),
    default="float32",
    show_default=True,
    help="Type the weights are written in.",
)
@handle_errors
def export(run: Path, out: Path, step: int | None, dtype: str) -> None:
    """Write the model in the run folder RUN to the new folder OUT, weights, config and tokenizer.

    \b
    jaxllm export runs/quickstart my-model
    python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('my-model')"
    """
    from jaxllm.exporting import export_run

    written = export_run(run, out, step, dtype, lambda text: click.echo(text, err=True))
    click.echo(f"wrote {out}: step {written.step}, {written.parameters:,} parameters, {dtype}")
