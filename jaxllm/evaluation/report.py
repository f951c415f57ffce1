"""What `jaxllm eval` found, for people, as JSON and as a picture of the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from jaxllm.evaluation.evaluate import Evaluated

_SHOWN_LABELS = 20  # a wider matrix does not fit a terminal; the picture and the JSON hold all of it


@dataclass(frozen=True)
class Report:
    """An evaluation with what it was made of.  model: the folder; step: of its checkpoint, None for a model folder."""

    model: str
    backend: str
    objective: str
    step: int | None
    examples: int
    found: Evaluated

    def to_json(self) -> dict[str, Any]:
        """In JSON's types; what is not finite becomes null."""
        found = self.found
        said: dict[str, Any] = {
            "model": self.model,
            "step": self.step,
            "backend": self.backend,
            "objective": self.objective,
            "examples": self.examples,
            "targets": found.targets,
            "loss": _finite(found.loss),
            "perplexity": _finite(found.perplexity),
            "bits_per_byte": _finite(found.bits_per_byte),
        }
        if found.measures is not None:
            said |= {"measures": found.measures.to_json()}
        return said

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        step = "" if self.step is None else f" after step {self.step:,}"
        yield f"{self.model}{step}, {self.objective}, backend {self.backend}: {self.examples:,} examples"
        values = Table(box=None, show_header=False, pad_edge=False)
        for name, value in self._values():
            values.add_row(name.replace("_", " "), f"{value:.6g}")
        yield values
        measures = self.found.measures
        if measures is not None and measures.per_label:
            yield _label_table(measures.per_label)
        if measures is not None and measures.confusion is not None:
            yield _confusion_table(measures.labels, measures.confusion)

    def _values(self) -> Iterator[tuple[str, float]]:
        found = self.found
        named = {"loss": found.loss, "perplexity": found.perplexity, "bits per byte": found.bits_per_byte}
        yield from ((name, value) for name, value in named.items() if value is not None)
        if found.measures is not None:
            yield from found.measures.values.items()


def _label_table(per_label: Any) -> Table:
    table = Table("label", box=box.SIMPLE_HEAD)
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right")
    for label, values in per_label.items():
        scores = (f"{values[name]:.4f}" for name in ("precision", "recall", "f1"))
        table.add_row(label, *scores, f"{values['support']:,.0f}")
    return table


def _confusion_table(labels: tuple[str, ...], confusion_LL: NDArray[np.int64]) -> Table | str:
    if len(labels) > _SHOWN_LABELS:
        return f"the confusion matrix of {len(labels)} labels is in the JSON and in the picture"
    table = Table("true \\ predicted", box=box.SIMPLE_HEAD, title="confusion matrix", title_justify="left")
    for label in labels:
        table.add_column(label, justify="right")
    for label, row in zip(labels, confusion_LL, strict=True):
        table.add_row(label, *(f"{count:,}" for count in row))
    return table


def draw_confusion(labels: tuple[str, ...], confusion_LL: NDArray[np.int64], picture: Path) -> None:
    """Write the confusion matrix as a PNG: colours are shares of each true label, numbers are counts."""
    from matplotlib.figure import Figure

    size = max(3.2, 0.7 * len(labels) + 2.0)
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    shares = confusion_LL / np.maximum(confusion_LL.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, column in np.ndindex(*confusion_LL.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{confusion_LL[row, column]:,}", ha="center", va="center", color=colour)
    figure.savefig(picture)


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
