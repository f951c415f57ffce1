"""How `jaxllm data` prints counts and sequences.  S tokens per sequence."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, SplitName
from jaxllm.data.tokenizer import Tokenizer

_UNWEIGHTED = "bold red"
_AROUND = 2  # tokens shown in the table on each side of a boundary


def print_counts(prepared: PreparedData, config: RunConfig) -> None:
    """Documents, tokens, bytes and sequences of both splits, and the tokenizer."""
    console = _console()
    console.print(f"{config.name}: data {prepared.fingerprint}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    splits = (prepared.train, prepared.validation)
    table.add_column("")
    for split in splits:
        table.add_column(split.name, justify="right")
    sequences = []
    for split in splits:
        with BatchPipeline(prepared, config, split.name) as pipeline:
            sequences.append(pipeline.sequences)
    table.add_row("documents", *(f"{split.documents.size:,}" for split in splits))
    table.add_row("tokens", *(f"{split.tokens:,}" for split in splits))
    table.add_row("bytes of text", *(f"{split.bytes:,}" for split in splits))
    table.add_row("bytes per token", *(f"{split.bytes / split.tokens:.3f}" for split in splits))
    table.add_row(f"sequences of {config.data.sequence_length}", *(f"{count:,}" for count in sequences))
    table.add_row(
        f"batches of {config.training.global_batch}", *(f"{count / config.training.global_batch:,.2f}" for count in sequences)
    )
    console.print(table)
    tokenizer = prepared.tokenizer
    ending = f"end of text {tokenizer.eos_token} ({tokenizer.eos_id})" if tokenizer.eos_token else "no end-of-text token"
    lines = [
        f"tokenizer: {prepared.vocab_size:,} entries, {ending}",
        f"unigram entropy of the validation tokens: {prepared.unigram_entropy:.4f} nats per token",
        f"left out: {prepared.empty_documents:,} documents without text, {prepared.skipped_lines:,} broken lines",
        f"kept in {prepared.folder}",
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def print_rows(prepared: PreparedData, config: RunConfig, split: SplitName, first: int, rows: int) -> None:
    """The first `rows` sequences from global batch `first` on."""
    console = _console()
    with BatchPipeline(prepared, config, split, start=first) as pipeline:
        number = first
        while rows > 0 and (pipeline.batches is None or number < pipeline.batches):
            batch, sequences = pipeline.batch(number), pipeline.sequence_numbers(number)
            for row in range(min(rows, batch.rows)):
                if sequences[row] >= 0:
                    console.print()
                    console.rule(f"{split} batch {number}, row {row}: sequence {sequences[row]}", align="left")
                    _print_row(console, prepared.tokenizer, batch, row, getattr(config.objective, "names", ()))
            rows -= batch.rows
            number += 1


def _print_row(console: Console, tokenizer: Tokenizer, batch: Batch, row: int, labels: tuple[str, ...]) -> None:
    """One row.  labels: names of what targets stand for; none where they are tokens."""
    segments_S, weights_S = batch.segments[row], batch.weights[row]
    padding = int((segments_S == 0).sum())
    documents = int(segments_S.max())
    console.print(
        f"{segments_S.size - padding} tokens of {documents} {'document' if documents == 1 else 'documents'}, "
        f"{int(weights_S.sum())} targets, {padding} padding"
    )
    if batch.source is not None and batch.source_segments is not None:
        source_S = batch.source[row][batch.source_segments[row] > 0]
        console.print(Text("── source", style="bold cyan"))
        console.print(Text(tokenizer.decode(source_S.tolist())), soft_wrap=True)
    for segment in range(1, documents + 1):
        (places,) = np.nonzero(segments_S == segment)
        console.print(Text(f"── document {segment}: tokens {places[0]} to {places[-1]}", style="bold cyan"))
        console.print(_text(tokenizer, batch, row, int(places[0]), int(places[-1]) + 1), soft_wrap=True)
    if weights_S.size != segments_S.size:  # the targets are the row's, not its tokens'
        console.print(f"target: {_row_target(batch.targets[row], labels)}", highlight=False, markup=False)
    console.print(_token_table(tokenizer, batch, row, labels))


def _row_target(targets: NDArray[np.generic], labels: tuple[str, ...]) -> str:
    """A label, all labels, or values."""
    if targets.dtype == np.int32:
        return labels[int(targets[0])]
    if set(targets.tolist()) <= {0.0, 1.0} and len(labels) > 1:
        return ", ".join(label for label, has in zip(labels, targets, strict=True) if has) or "none of the labels"
    return ", ".join(f"{value:g}" for value in targets.tolist())


def _text(tokenizer: Tokenizer, batch: Batch, row: int, start: int, stop: int) -> Text:
    """The decoded tokens; those whose target has no weight stand out."""
    text = Text()
    weights = _token_weights(batch, row)[start:stop]
    edges = [0, *(np.nonzero(np.diff(weights))[0] + 1).tolist(), stop - start]
    for left, right in pairwise(edges):
        tokens = batch.inputs[row, start + left : start + right].tolist()
        text.append(tokenizer.decode(tokens), style=_UNWEIGHTED if weights[left] == 0 else "")
    return text


def _token_weights(batch: Batch, row: int) -> NDArray[np.float32]:
    """The weight of each token's target; 1 for every token where the target is the row's."""
    weights = batch.weights[row]
    return weights if weights.size == batch.sequence_length else np.ones(batch.sequence_length, np.float32)


def _token_table(tokenizer: Tokenizer, batch: Batch, row: int, labels: tuple[str, ...]) -> Table:
    """The tokens at the start, the end and around each boundary, with everything a model is given for them."""
    segments_S, weights_S = batch.segments[row], _token_weights(batch, row)
    size = segments_S.size
    per_token = batch.targets.shape[1] == size
    edges = [0, *(np.nonzero(np.diff(segments_S))[0] + 1).tolist(), size]
    shown = sorted({place for edge in edges for place in range(edge - _AROUND, edge + _AROUND) if 0 <= place < size})
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("token", "segment", "position", "weight"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("input", "target"):
        table.add_column(column, no_wrap=True)
    before = -1
    for place in shown:
        if place != before + 1:
            table.add_row(*["…"] * 6)
        before = place
        weight = float(weights_S[place])
        target = Text("-")
        if weight and per_token:
            number = int(batch.targets[row, place])
            target = Text(labels[number]) if labels else _token(tokenizer, number)
        segment = int(segments_S[place])
        table.add_row(
            str(place),
            str(segment),
            str(batch.positions[row, place]),
            f"{weight:g}",
            _token(tokenizer, int(batch.inputs[row, place])) if segment else Text("padding"),
            target,
            style="" if weight else _UNWEIGHTED,
        )
    return table


def _console() -> Console:
    # Where there is no terminal (a pipe, a log) there is no width to keep to.
    return Console(width=None if sys.stdout.isatty() else 120)


def _token(tokenizer: Tokenizer, token: int) -> Text:
    return Text(f"{tokenizer.decode([token])!r} ({token})")
