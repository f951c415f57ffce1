"""The command: see `benchmarks.planner`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import benchmarks.planner
from benchmarks._report import commit, write
from benchmarks.planner.cases import BOUND, CASES, Case
from benchmarks.planner.compare import line, measure, work
from benchmarks.planner.compiled import compiled_rows
from benchmarks.planner.flops import compare_flops

KINDS = ("cpu", "tpu", "deepspeed", "flops")

Key = tuple[str, str, str]


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner",
        description=benchmarks.planner.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--case")
    parser.add_argument("--again", action="store_true", help="Measure also what is in the file already.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(next(case for case in CASES if (case.name, case.where) == (arguments.case, arguments.worker)))
    wanted = arguments.only or KINDS
    known, fresh = _known(arguments.json), dict[Key, dict[str, Any]]()
    for case in CASES:
        key = _key(case)
        if not _is_asked(key, wanted, arguments.case):
            continue
        if arguments.again or key not in known:
            fresh[key] = {"measured": measure(case), "commit": (commit() or {}).get("commit")}
            _write(arguments.json, fresh)
        print(_said(line(case, {**known, **fresh}[key]["measured"])), flush=True)
    flops = compare_flops() if "flops" in wanted and arguments.case is None else []
    for each in flops:
        print(f"{each['name']:44} {each['measured']:.5g} FLOPs, predicted {each['predicted']:.5g} ({each['error']:+.2%})")
    for kind, lines in _write(arguments.json, fresh, flops).items():
        print(f"{kind}: {len(lines)} cases, largest error {max(abs(each['error']) for each in lines):.1%}")


def _key(case: Case) -> Key:
    return case.kind, case.name, case.where


def _is_asked(key: Key, kinds: tuple[str, ...], name: str | None) -> bool:
    return key[0] in kinds and name in (None, key[1])


def _known(path: Path | None) -> dict[Key, dict[str, Any]]:
    """What an earlier run has measured."""
    if path is None or not path.exists():
        return {}
    results = json.loads(path.read_text())["results"]
    return {
        (kind, row["name"], row["where"]): {"measured": row["measured"], "commit": row.get("commit")}
        for kind in KINDS
        for row in results.get(kind, [])
        if kind != "flops"
    }


def _write(path: Path | None, fresh: dict[Key, dict[str, Any]], flops: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Every case that was ever measured, by kind, against what is predicted now.

    fresh: what this run has measured.  What another has written in the meantime stays: CPU and TPU cases may be measured side
    by side.
    """
    results: dict[str, Any] = {}
    rows = {**_known(path), **fresh}
    for case in CASES:
        if _key(case) in rows:
            row = rows[_key(case)]
            results.setdefault(case.kind, []).append({**line(case, row["measured"]), "commit": row["commit"]})
    results["compiled"] = list(compiled_rows())
    if not flops and path is not None and path.exists():
        flops = json.loads(path.read_text())["results"].get("flops")
    if flops:
        results["flops"] = flops
    write(path, results)
    return results


def _said(row: dict[str, Any]) -> str:
    sizes = f"measured {row['measured'] / 2**20:10.1f} MiB, predicted {row['predicted'] / 2**20:10.1f} MiB"
    return f"{row['where']:12} {row['name']:40} {sizes} ({row['error']:+.1%}){'' if abs(row['error']) <= BOUND else '  MISSED'}"


if __name__ == "__main__":
    main()
