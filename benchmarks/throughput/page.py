"""The table and the plot of docs/performance.md, made from the results files.

    python -m benchmarks.throughput.page

Reads benchmarks/results/throughput_cpu.json and throughput_gpu.json, writes docs/images/throughput.png and what stands between
the two markers of docs/performance.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._report import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "performance.md", DOCS / "images" / "throughput.png"
BEGIN, END = "<!-- throughput: begin -->\n", "<!-- throughput: end -->\n"


def text_of(suite: str, report: dict[str, Any]) -> Iterator[str]:
    """Markdown of one results file."""
    results = report["results"]
    yield f"**{suite}.** "
    if "not_run" in results:
        yield f"{results['not_run']} The command: `{results['command']}`\n\n"
        return
    machine = report["machine"]
    yield f"{machine['cpu']}, {machine['cpus']} processors.\n\n"
    for case in results["cases"]:
        yield from _table(case)


def _table(case: dict[str, Any]) -> Iterator[str]:
    said = case["case"]
    yield (
        f"{said['name']}: {case['parameters'] / 1e6:.1f} M parameters, {said['rows']} x {said['sequence']} tokens. Products "
        f"alone would allow {case['limit_tokens_per_s']:,.0f} tokens/s.\n\n"
    )
    yield (
        "| contender | tokens/s (range) | measured | TFLOP/s | MFU | of products alone | peak memory | compile | losses |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in case["contenders"]:
        if "failure" in row:
            yield f"| {row['name']} | {row['failure']} | | | | | | | |\n"
            continue
        low, high = row["tokens_per_s_range"]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        share = row["tokens_per_s"] / case["limit_tokens_per_s"]
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"]) + ("" if row["same_work"] else " **not the same work**")
        measured = f"{row['measured']['date']}, {len(row['rounds'])} x"
        yield (
            f"| {row['name']} | {row['tokens_per_s']:,.0f} ({low:,.0f} to {high:,.0f}) | {measured} | "
            f"{row['model_tflops']:.3f} | {mfu} | {share:.2f} | {row['memory_bytes'] / 2**30:.2f} GiB | "
            f"{row['compile_seconds']:.1f} s | {losses} |\n"
        )
    yield "\n"
    for ratio in case["ratios"]:
        low, high = ratio["range"]
        reached = "reached" if ratio["reached"] else "missed"
        yield (
            f"- {ratio['of']} / {ratio['over']}: {ratio['ratio']:.2f} ({low:.2f} to {high:.2f}, {_rounds(ratio)}); "
            f"wanted {ratio['target']}: {reached}\n"
        )
    yield "\n"


def _rounds(ratio: dict[str, Any]) -> str:
    number = ratio["rounds"]
    return "one round" if number == 1 else f"{number} rounds"


def plot(cases: list[dict[str, Any]]) -> None:
    """Tokens/s of every contender as a part of what products alone would allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 + 2.6 * len(cases)), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        rows = [row for row in case["contenders"] if "tokens_per_s" in row][::-1]
        limit = case["limit_tokens_per_s"]
        shares = [row["tokens_per_s"] / limit for row in rows]
        spread = [[abs(row["tokens_per_s_range"][side] / limit - share) for row, share in zip(rows, shares, strict=True)]
                  for side in (0, 1)]  # fmt: skip
        colours = ["tab:blue" if row["name"].startswith("jaxllm") else "tab:gray" for row in rows]
        axes.barh([row["name"] for row in rows], shares, xerr=spread, color=colours, ecolor="black", capsize=2)
        axes.set_xlim(0, 1)
        axes.set_title(case["case"]["name"], fontsize="medium")
        axes.set_xlabel("tokens/s as a part of what matrix products alone would allow")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parts, cases = [], []
    for suite in ("cpu", "gpu"):
        report = json.loads((RESULTS / f"throughput_{suite}.json").read_text())
        parts += text_of(suite.upper(), report)
        cases += report["results"].get("cases", [])
    if cases:
        plot(cases)
        parts.append("![Throughput of every contender](images/throughput.png)\n\n")
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + BEGIN + "\n" + "".join(parts) + after)


if __name__ == "__main__":
    main()
