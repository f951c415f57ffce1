"""The report in the terminal: every check as soon as it is measured, then the ladder as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jaxllm.config.schema import Precision
from jaxllm.parity.results import LEVELS, Check, Level, Report

_SHOWN_PARAMETERS = 8
"""Parameters of one level that are shown, the worst first; the others are counted."""

AMPLIFIES = (
    "This run amplifies rounding errors: see `control`, where JAX departs from itself because sums are added up in another "
    "order. It says nothing about the backends; compare fewer steps (--steps), or a lower optimizer.learning_rate."
)

REFEREED = (
    "fp64 is the referee: see `referee`, how far each backend is from itself in fp64. Two that are as far from it as from each "
    "other differ by rounding, which this model amplifies; one that is much further away loses digits where the other does not."
)

_WIDTHS = {"precision": 5, "level": 10, "measured": 9, "bound": 8, "verdict": 4}
# Columns are two apart.
_FIXED = sum(_WIDTHS.values()) + 2 * len(_WIDTHS)


class Terminal:
    """Shows checks as they come.  Those of single parameters are held back until all of their level are known."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._parameters: list[Check] = []
        self._begun = False

    def begin(self, text: str) -> None:
        """What is compared."""
        self.console.print(text, style="bold", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A sentence for a person."""
        self.console.print(f"note: {escape(text)}", style="yellow", soft_wrap=True)

    def check(self, check: Check) -> None:
        """Show one check, or keep it when it is one of many gradients."""
        if self._parameters and (check.level, check.precision) != (self._parameters[0].level, self._parameters[0].precision):
            self.flush()
        if check.level in ("backward", "optimizer") and "parameter" in check.detail:
            self._parameters.append(check)
            return
        self.flush()
        self._row(check)

    def finish(self, report: Report) -> None:
        """Show what was kept back, the ladder, and the verdict."""
        self.flush()
        self.console.print()
        self.console.print(_ladder(report.checks))
        failed = [check for check in report.checks if not check.passed]
        if not report.checks:
            self.console.print("nothing was checked", style="bold red")
        elif failed:
            self.console.print(f"FAILED: {len(failed)} of {len(report.checks)} checks broke their bound", style="bold red")
            if any(check.detail.get("referee") for check in report.checks):
                self.console.print(REFEREED)
            if any(check.detail.get("amplifies") for check in report.checks):
                self.console.print(AMPLIFIES)
            else:
                self.console.print("`--find` names the first operation that departs")
        else:
            self.console.print(f"passed: {len(report.checks)} checks, no bound broken", style="bold green")

    def flush(self) -> None:
        """Show what was held back."""
        checks = sorted(self._parameters, key=badness, reverse=True)
        shown = [check for at, check in enumerate(checks) if at < _SHOWN_PARAMETERS or not check.passed]
        for check in shown:
            self._row(check)
        if rest := checks[len(shown) :]:
            text = f"and {len(rest)} more, at most {figure(rest[0].measured)}"
            self.console.print(" " * (_WIDTHS["precision"] + _WIDTHS["level"] + 4) + text, style="dim")
        self._parameters = []

    def _row(self, check: Check) -> None:
        width = max(self.console.width - _FIXED, 30)
        if not self._begun:
            self.console.print(
                _grid(width, [Text(head, "bold") for head in ("", "level", "compared", "measured", "bound", "")])
            )
            self._begun = True
        mark = Text("ok", "green") if check.passed else Text("FAIL", "bold red")
        cells = (check.precision, check.level, check.name, figure(check.measured), bound_text(check.bound))
        self.console.print(_grid(width, [*map(Text, cells), mark]))


def _grid(width: int, cells: Sequence[Text]) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0))
    justify: dict[str, Literal["left", "right"]] = {"measured": "right", "bound": "right"}
    for name in ("precision", "level", "compared", "measured", "bound", "verdict"):
        row.add_column(width=_WIDTHS.get(name, width), justify=justify.get(name, "left"))
    row.add_row(*cells)
    return row


@dataclass(frozen=True)
class Rung:
    """All checks of one level in one precision.  worst: the one that is nearest to, or furthest beyond, its bound."""

    level: Level
    precision: Precision
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        return max(self.checks, key=badness)


def rungs(checks: Sequence[Check]) -> list[Rung]:
    """The checks by level and precision, from the bottom of the ladder up; what has no bound is apart from what has one."""
    found: dict[tuple[int, Precision, bool], list[Check]] = {}
    for check in checks:
        found.setdefault((LEVELS.index(check.level), check.precision, math.isinf(check.bound)), []).append(check)
    order: dict[Precision, int] = {"fp64": 0, "fp32": 1, "bf16": 2}
    keys = sorted(found, key=lambda key: (order[key[1]], key[0], key[2]))
    return [Rung(LEVELS[key[0]], key[1], tuple(found[key])) for key in keys]


def _ladder(checks: Sequence[Check]) -> Table:
    table = Table(title="the ladder", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("", "level", "checks", "worst", "bound", "", "where"):
        table.add_column(name, justify="right" if name in ("checks", "worst", "bound") else "left", overflow="fold")
    for rung in rungs(checks):
        worst = rung.worst
        mark = Text("ok", "green") if rung.passed else Text("FAIL", "bold red")
        cells = (rung.precision, rung.level, str(len(rung.checks)), figure(worst.measured), bound_text(worst.bound))
        table.add_row(*cells, mark, Text(worst.name))
    return table


def badness(check: Check) -> float:
    """An order from good to bad: the part of its bound that a check takes up."""
    if math.isnan(check.measured):
        return math.inf
    return check.measured / check.bound if 0.0 < check.bound < math.inf else check.measured


def figure(value: float) -> str:
    """A relative error for a person."""
    return "0" if value == 0.0 else f"{value:.1e}"


def bound_text(bound: float) -> str:
    """A bound for a person."""
    return "none" if math.isinf(bound) else figure(bound)
