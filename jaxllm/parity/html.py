"""The report as one HTML file that needs nothing else: no script, no font, no image from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from jaxllm.config.schema import Precision
from jaxllm.parity.figures import error_figure, gradient_figure, loss_figure
from jaxllm.parity.report import AMPLIFIES, REFEREED, bound_text, figure, rungs
from jaxllm.parity.results import Check, Curve, Level, Report
from jaxllm.parity.tolerances import TOLERANCES

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22272e; background: #fff;
       max-width: 1120px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; border-bottom: 1px solid #e6e8eb; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; } p { margin: .3rem 0; } .quiet { color: #6b737c; }
.verdict { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; color: #fff; font-weight: 600; }
.ok { color: #0a7d4b; } .fail { color: #c0392b; font-weight: 600; }
.verdict.ok { background: #0a7d4b; color: #fff; } .verdict.fail { background: #c0392b; color: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } tr.fail td { background: #fdf0ee; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #eef0f2; vertical-align: top; }
th { color: #6b737c; font-weight: 600; } .number { text-align: right; white-space: nowrap; }
svg { max-width: 100%; height: auto; } details { margin: .6rem 0; } summary { cursor: pointer; }
"""

_LEVELS: dict[Level, str] = {
    "trajectory": "the same run in different layouts",
    "switch": "runs that changed over in the middle",
    "noise": "bf16 beside fp32",
}


def html_report(report: Report) -> str:
    """The page."""
    body = "\n".join(
        [*_head(report), *_ladder(report), *_broken(report), *_curves(report), *_gradients(report), *_tables(report)]
    )
    title = escape(f"parity of {report.config}")
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _head(report: Report) -> Iterator[str]:
    word = "passed" if report.passed else "failed"
    kind = "ok" if report.passed else "fail"
    yield f'<h1>Parity of {escape(report.config)} <span class="verdict {kind}">{word}</span></h1>'
    yield (
        f"<p>{escape(report.family)}, {len(report.checks)} checks, runs of {report.steps} steps. "
        "Every figure is relative: the largest difference over the largest magnitude of the reference.</p>"
    )
    for note in report.notes:
        yield f"<p>Note: {escape(note)}.</p>"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    machine = ", ".join(str(report.machine[key]) for key in ("cpu", "platform") if key in report.machine)
    yield f'<p class="quiet">{escape(machine)}</p><p class="quiet">{escape(versions)}</p>'


def _ladder(report: Report) -> Iterator[str]:
    yield "<h2>The ladder</h2>"
    rows = []
    for rung in rungs(report.checks):
        cells = (rung.precision, rung.level, str(len(rung.checks)), figure(rung.worst.measured), bound_text(rung.worst.bound))
        rows.append((rung.passed, (*cells, "ok" if rung.passed else "FAIL", rung.worst.name)))
    yield _table(("", "level", "checks", "worst", "bound", "", "where the worst is"), rows, numbers=(2, 3, 4))


def _broken(report: Report) -> Iterator[str]:
    failed = [check for check in report.checks if not check.passed]
    if failed:
        yield "<h2>Broken bounds</h2>"
        if any(check.detail.get("amplifies") for check in report.checks):
            yield f"<p>{escape(AMPLIFIES)}</p>"
        refereed = [check for check in report.checks if check.detail.get("referee")]
        if refereed:
            yield f"<p>{escape(REFEREED)}</p>"
        yield _checks([*failed, *refereed])


def _curves(report: Report) -> Iterator[str]:
    for level, text in _LEVELS.items():
        for precision in ("fp64", "fp32", "bf16"):
            drawn = _drawn(report.curves, level, precision)
            if any(curve.reference for curve in drawn):
                yield f"<h2>{level.capitalize()}, {precision}: {text}</h2>"
                yield from _pictures(drawn, level, precision)


def _drawn(curves: Sequence[Curve], level: Level, precision: Precision) -> list[Curve]:
    """The curves of one picture, each once.  The bf16 runs are drawn with the fp32 runs they are compared with."""
    wanted = {precision, "fp32"} if level == "noise" else {precision}
    if level == "noise" and precision != "bf16":
        return []
    found = {(curve.name, curve.precision, curve.reference): curve for curve in curves if curve.level == level}
    return [curve for curve in found.values() if curve.precision in wanted]


def _pictures(curves: Sequence[Curve], level: Level, precision: Precision) -> Iterator[str]:
    once = {(curve.name, curve.precision): curve for curve in reversed(curves)}
    compared = [curve for curve in curves if curve.reference is not None]
    limits = TOLERANCES.get(precision) if level != "noise" else None
    yield "<h3>Loss</h3>"
    yield loss_figure(list(reversed(once.values())))
    yield "<h3>Relative difference of the loss</h3>"
    bound = limits.trajectory_loss if limits else float("inf")
    yield error_figure(compared, lambda curve: curve.loss_error, "relative difference", bound)
    yield "<h3>Relative distance of the parameters, of the tensor that is furthest away</h3>"
    bound = limits.trajectory_parameters if limits else float("inf")
    yield error_figure(compared, lambda curve: curve.parameter_distance, "relative distance", bound)


def _gradients(report: Report) -> Iterator[str]:
    gradients = report.gradients()
    for precision in dict.fromkeys(gradient.precision for gradient in gradients):
        yield f"<h2>Gradients, {precision}: the worst error over all inputs</h2>"
        yield gradient_figure(gradients, precision, TOLERANCES[precision].value)


def _tables(report: Report) -> Iterator[str]:
    yield "<h2>Every check</h2>"
    for rung in rungs(report.checks):
        worst = f"at most {figure(rung.worst.measured)}, bound {bound_text(rung.worst.bound)}"
        yield f"<details><summary>{rung.precision}, {rung.level}: {len(rung.checks)} checks, {worst}</summary>"
        yield _checks(rung.checks)
        yield "</details>"


def _checks(checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        measured, bound = figure(check.measured), bound_text(check.bound)
        rows.append(
            (check.passed, (check.precision, check.level, check.name, measured, bound, "ok" if check.passed else "FAIL"))
        )
    return _table(("", "level", "compared", "measured", "bound", ""), rows, numbers=(3, 4))


def _table(head: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]], numbers: Sequence[int]) -> str:
    def cell(tag: str, at: int, text: str) -> str:
        kind = ' class="number"' if at in numbers else f' class="{text.lower()}"' if text in ("ok", "FAIL") else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    lines = ["<table><tr>" + "".join(cell("th", at, text) for at, text in enumerate(head)) + "</tr>"]
    for passed, cells in rows:
        row = "<tr>" if passed else '<tr class="fail">'
        lines.append(row + "".join(cell("td", at, text) for at, text in enumerate(cells)) + "</tr>")
    return "\n".join([*lines, "</table>"])
