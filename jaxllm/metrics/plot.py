"""loss.png: the course of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.metrics.sinks.jsonl import parse_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = NDArray[np.float64]

_TRAIN, _VALIDATION, _RATE, _QUIET = "#1f6fb4", "#d1495b", "#5c6670", "#8a9099"
_SMOOTHING = 0.01  # width of the smoothed line's window as a fraction of the logged points


def plot_losses(metrics: Path, picture: Path, unigram_entropy: float | None = None, title: str | None = None) -> bool:
    """Draw training and validation loss and the learning rate over the steps of a run.

    unigram_entropy: nats per token of the best model that ignores all context, drawn as a line to compare with.  title:
    default the name of the run folder.  Returns whether there was anything to draw; nothing is written otherwise.
    """
    records = parse_metrics(metrics.read_text(encoding="utf-8")) if metrics.exists() else []
    train = [record for record in records if record["split"] == "train"]
    validation = [record for record in records if record["split"] == "validation"]
    if not train and not validation:
        return False
    figure = _draw(train, validation, title or metrics.resolve().parent.name, unigram_entropy)
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(picture)
    return True


def smooth(values: Series, width: float) -> Series:
    """Mean weighted by a Gaussian of `width` points standard deviation around each point, so that nothing lags behind."""
    from scipy.ndimage import gaussian_filter1d

    # Divided by the weights that fall inside, so that the ends are means of what there is and no point counts twice.
    weights = gaussian_filter1d(np.ones_like(values), width, mode="constant")
    return np.asarray(gaussian_filter1d(values, width, mode="constant") / weights, np.float64)


def _draw(
    train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], title: str, entropy: float | None
) -> Figure:
    # Figure without pyplot: no global state, and no window system is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained", facecolor="white")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_losses(losses, train, validation, entropy)
    _draw_rates(rates, train)
    for axes in (losses, rates):
        _style(axes)
    losses.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#22272e")
    figure.align_ylabels()
    return figure


def _draw_losses(
    axes: Axes, train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], entropy: float | None
) -> None:
    if train:
        steps, values = _series(train, "loss")
        width = _SMOOTHING * len(values)
        few = width < 1.0  # so few points that smoothing would hide them
        axes.plot(steps, values, color=_TRAIN, alpha=1.0 if few else 0.3, linewidth=1.6 if few else 0.8,
                  label="train" if few else None)  # fmt: skip
        if not few:
            axes.plot(steps, smooth(values, width), color=_TRAIN, linewidth=1.8, label="train (smoothed)")
    if validation:
        steps, values = _series(validation, "loss")
        axes.plot(steps, values, color=_VALIDATION, linewidth=1.2, marker="o", markersize=4.5, label="validation")
        if values.size and math.isfinite(values[-1]):
            note = f"{values[-1]:.3f}"
            axes.annotate(note, (steps[-1], values[-1]), xytext=(4, 9), textcoords="offset points", ha="right", fontsize=9,
                          fontweight="bold", color=_VALIDATION)  # fmt: skip
    if entropy is not None:
        axes.axhline(entropy, color=_QUIET, linestyle=(0, (5, 4)), linewidth=1.1, label=f"unigram entropy {entropy:.3f}")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_rates(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = _series(train, "learning_rate")
    axes.plot(steps, values, color=_RATE, linewidth=1.3)
    axes.fill_between(steps, values, color=_RATE, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("learning rate", fontsize=9)
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value else "0")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="y", nbins=3)


def _style(axes: Axes) -> None:
    axes.grid(visible=True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5c9ce")
    axes.tick_params(colors="#444b53", labelsize=9)
    axes.margins(x=0.02)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[Series, Series]:
    """Steps and values of a key, by step; the newest value where a step stands twice, and no point where it is null."""
    points = {record["step"]: record[key] for record in records if record.get(key) is not None}
    steps = sorted(points)
    return np.array(steps, np.float64), np.array([points[step] for step in steps], np.float64)
