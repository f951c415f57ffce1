"""The pictures of a parity report, as SVG text: curves of whole runs, and gradient errors by layer and kind of weight."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.config.schema import Precision
from jaxllm.parity.results import Curve, GradientError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROUNDING: dict[Precision, float] = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-24}
"""A rounding of the numbers that losses and gradients are in.  On the log scale nothing, zero included, is drawn below it."""

_INK, _QUIET, _BOUND = "#22272e", "#6b737c", "#c0392b"
# Okabe and Ito's palette, which colour-blind people can tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#7f7f7f")
_MOST_ANNOTATED_CELLS = 400
_LONG_LABEL = 64


def loss_figure(curves: Sequence[Curve]) -> str:
    """The losses of several runs over each other."""
    figure, axes = _axes("loss (nats per token)")
    for at, curve in enumerate(curves):
        # Every curve is drawn thinner than the one below it, so that those that agree are all seen.
        width = max(6.0 - 5.0 * at / max(len(curves) - 1, 1), 1.0) if len(curves) > 1 else 2.0
        _line(axes, curve.name, curve.loss, at, width)
        _mark_switch(axes, curve)
    return _finished(figure, axes)


def error_figure(curves: Sequence[Curve], values: Callable[[Curve], Mapping[int, float]], label: str, bound: float) -> str:
    """Relative errors over the steps on a log scale, with the bound they must stay below."""
    figure, axes = _axes(label)
    axes.set_yscale("log")
    for at, curve in enumerate(curves):
        floor = _ROUNDING[curve.precision]
        floored = {step: max(value, floor) for step, value in values(curve).items() if math.isfinite(value)}
        _line(axes, f"{curve.name} against {curve.reference}", floored, at, 1.4)
        _mark_switch(axes, curve)
    if math.isfinite(bound):
        axes.axhline(bound, color=_BOUND, linestyle=(0, (5, 4)), linewidth=1.2, label=f"bound {bound:.0e}")
    return _finished(figure, axes)


def gradient_figure(gradients: Sequence[GradientError], precision: Precision, bound: float) -> str:
    """The error of every gradient of one precision: a row for each kind of weight, a column for each layer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    errors = [gradient for gradient in gradients if gradient.precision == precision]
    inside = [gradient for gradient in errors if gradient.layer is not None]
    outside = [gradient for gradient in errors if gradient.layer is None]
    layers = sorted({gradient.layer for gradient in inside if gradient.layer is not None})
    kinds = [*sorted({gradient.kind for gradient in outside}), *sorted({gradient.kind for gradient in inside})]
    columns = {None: 0} | {layer: at + 1 for at, layer in enumerate(layers)}
    table = np.full((len(kinds), len(columns)), np.nan)
    for gradient in errors:
        table[kinds.index(gradient.kind), columns[gradient.layer]] = _logarithm(gradient.error)
    width = min(4.0 + 0.6 * len(columns), 16.0)
    figure = Figure(figsize=(width, 1.2 + 0.32 * len(kinds)), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    lowest, limit = math.log10(_ROUNDING[precision]), math.log10(bound)
    # So few colours that the bar beside the map is drawn with rectangles and not as a bitmap.
    colours = colormaps["YlGnBu"].resampled(48).with_extremes(over=_BOUND)
    image = axes.pcolormesh(table, cmap=colours, vmin=lowest, vmax=limit, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.set_xticks(np.arange(len(columns)) + 0.5, ["none", *map(str, layers)])
    axes.set_xlabel("layer")
    axes.tick_params(length=0, colors=_INK, labelsize=9)
    axes.spines[:].set_visible(False)
    if table.size <= _MOST_ANNOTATED_CELLS:
        _annotate(axes, table, (lowest + limit) / 2.0)
    bar = figure.colorbar(image, ax=axes, pad=0.01, extend="max")
    bar.set_label("log10 of the relative error, up to the bound", color=_INK, fontsize=9)
    bar.outline.set_visible(False)
    return _svg(figure)


def _logarithm(error: float) -> float:
    """Of zero: far below anything that is drawn.  Of NaN: far above."""
    return math.inf if math.isnan(error) else math.log10(max(error, sys.float_info.min))


def _annotate(axes: Axes, table: np.ndarray[tuple[int, int], np.dtype[np.float64]], dark: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        if not math.isnan(value):
            text = "0" if value < math.log10(sys.float_info.epsilon) - 3 else f"{value:.1f}"
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color="white" if value > dark else _INK
            )


def _axes(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_ylabel(label, color=_INK)
    axes.set_xlabel("step", color=_INK)
    axes.grid(visible=True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5c9ce")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.margins(x=0.02)
    return figure, axes


def _line(axes: Axes, label: str, points: Mapping[int, float], at: int, width: float) -> None:
    style = "-" if at < len(_COLOURS) else "--"
    marker = "o" if len(points) < 3 else None  # a line of one point would not be seen
    steps, values = list(points), list(points.values())
    axes.plot(steps, values, style, color=_COLOURS[at % len(_COLOURS)], linewidth=width, label=label, marker=marker)


def _mark_switch(axes: Axes, curve: Curve) -> None:
    if curve.switched_at is not None:
        axes.axvline(curve.switched_at, color=_QUIET, linestyle=":", linewidth=1.0)


def _finished(figure: Figure, axes: Axes) -> str:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = [str(label) for label in axes.get_legend_handles_labels()[1]]
    columns = 1 if max(map(len, labels), default=0) > _LONG_LABEL else 2
    figure.set_figheight(3.2 + 0.19 * math.ceil(len(labels) / columns))
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=columns)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an `<svg>` element; text stays text, in the page's font."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxllm", "font.family": "sans-serif"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]
