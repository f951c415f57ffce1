"""`jaxllm eval RUN`: how good a trained model is, on its validation split or on other data."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from jaxllm.cli.options import handle_errors, set_option


@click.command(name="eval")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--data", "files", multiple=True, metavar="FILE", help="Evaluate on this file or glob instead. May be repeated.")
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="NAME=FIELD",
    help="With --data: a field of its rows, for example text=sentence or label=label. May be repeated.",
)
@click.option("--backend", type=click.Choice(["jax", "deepspeed"]), help="Default: the one the run names.")
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint to use; default: the newest.")
@click.option("--batch", type=click.IntRange(min=1), help="Examples in one forward pass; default: the run's global_batch.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything that was measured to this file.")
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Where the confusion matrix is drawn; default: RUN/confusion.png."
)
@click.option("--beams", type=click.IntRange(min=1), help="seq2seq: targets followed at once; default 4; 1 is greedy.")
@click.option("--length-penalty", type=float, help="seq2seq: more than 0 favours long targets; default 1.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="seq2seq: of a target; default: as in training.")
@click.option(
    "--written", type=click.Path(path_type=Path), help="seq2seq: write source, target and what was written here (JSONL)."
)
@set_option("training.precision=bf16")
@handle_errors
def eval_(  # noqa: PLR0913, PLR0917 - one for each option
    run: Path,
    files: tuple[str, ...],
    fields: tuple[str, ...],
    backend: str | None,
    step: int | None,
    batch: int | None,
    json_file: Path | None,
    figure: Path | None,
    beams: int | None,
    length_penalty: float | None,
    max_new_tokens: int | None,
    written: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Evaluate the model in RUN: a run folder, or a folder that `jaxllm export` or `save_pretrained` wrote.

    \b
    jaxllm eval runs/bert-sst2
    jaxllm eval my-model --data test.tsv --field text=sentence --field label=label
    jaxllm eval runs/t5-multi30k --beams 4 --written translations.jsonl
    """
    from rich.console import Console

    from jaxllm.config.schema import BackendName
    from jaxllm.evaluation.report import Report, draw_confusion
    from jaxllm.evaluation.run import evaluate_trained
    from jaxllm.evaluation.subject import OtherData, subject
    from jaxllm.evaluation.written import save_written
    from jaxllm.generation.load import load_trained
    from jaxllm.generation.search import Search

    other = OtherData(files, _fields(fields)) if files else None
    if fields and not files:
        raise click.UsageError("--field belongs to --data")
    trained, data = subject(run, load_trained(run, step, lambda text: click.echo(text, err=True), overrides), other, batch)
    name: BackendName = "jax" if (backend or trained.run.config.backend) == "jax" else "deepspeed"
    if name == "deepspeed":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    search = None
    if trained.run.config.objective.kind == "seq2seq":
        settings = trained.run.config.data
        longest = max_new_tokens or settings.target_length or settings.sequence_length
        search = Search(beams or 4, longest, 1.0 if length_penalty is None else length_penalty)
    elif any(option is not None for option in (beams, length_penalty, max_new_tokens, written)):
        raise click.UsageError("--beams, --length-penalty, --max-new-tokens and --written are for seq2seq models")
    found = evaluate_trained(name, trained, data, search)
    checkpoint = trained.checkpoint
    objective = trained.run.config.objective.kind
    report = Report(str(run), name, objective, checkpoint.step if checkpoint else None, data.validation.documents.size, found)
    Console(width=None if sys.stdout.isatty() else 120).print(report, highlight=False)
    picture = figure or (run / "confusion.png" if checkpoint is not None else None)
    measures = found.measures
    if measures is not None and measures.confusion is not None and picture is not None:
        draw_confusion(measures.labels, measures.confusion, picture)
        click.echo(f"confusion matrix: {picture}")
    if written is not None:
        save_written(written, found.written)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")


def _fields(given: tuple[str, ...]) -> dict[str, str]:
    """`text=sentence` -> `{"text_field": "sentence"}`."""
    known = ("text", "second", "target", "label")
    fields = {}
    for each in given:
        name, equals, field = each.partition("=")
        if not equals or name not in known or not field:
            raise click.UsageError(f"--field {each}: give NAME=FIELD, NAME being one of {', '.join(known)}")
        fields[f"{name}_field"] = field
    return fields
