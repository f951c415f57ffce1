"""Training throughput, side by side against what a user would pick instead.

    python -m benchmarks.throughput --suite cpu|gpu [--quick] [--only PATTERN ...] [--contenders PATTERN ...] [--rounds N]
        [--once PATTERN ...] [--budget SECONDS] [--cache FOLDER] [--json OUT [--add]]

Contenders take turns, A B A B, each time in a fresh process in a virtual environment of its own, which is built from the
package index when it is first needed.  All train the same model from the same weights on the same tokens with the same AdamW
and clipping; the losses of the first steps are compared, so that nobody wins by doing less.  Compilation and warm-up are set
apart; numbers are medians over blocks of steps of all rounds, ratios medians over rounds, with their range.  Model FLOP/s and
MFU follow one formula (`jaxllm.metrics.flops`: causal attention counted once, nothing recomputed counted).  The limit is the
fastest rate of large matrix products that torch or JAX reaches here in that precision.

What cannot be installed or run is listed with its reason.  --only, --contenders and --once take patterns like '10M-512-*' and
'jaxllm*'.  All sizes take hours: --once lists who takes part in the first round only, and --add keeps the cases that OUT has
of other runs, and of a case measured again the contenders and the ratios that this run has not; each says when it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._report import commit, today, write
from benchmarks.throughput.cases import SUITES, Case
from benchmarks.throughput.contenders import CONTENDERS
from benchmarks.throughput.driver import Driver, Settings, matches
from benchmarks.throughput.report import added, lines, stamp_all, summary

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxllm" / "benchmarks"
# The GPU suite is to be done in eight minutes, from the first process on; a case takes half of what is left at most, so that
# the largest, which comes first, leaves time for the others.
BUDGETS = {"cpu": 6 * 3600.0, "gpu": 470.0}
SHARES = {"cpu": 1.0, "gpu": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--quick", action="store_true", help="one round of the smallest case in every precision, fewer steps")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases")
    parser.add_argument("--contenders", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--once", nargs="+", default=[], metavar="PATTERN", help="contenders of the first round only")
    parser.add_argument("--rounds", type=int, help="default: 3 on a CPU, 2 on a GPU")
    parser.add_argument("--budget", type=float, help="seconds after which no process is started any more")
    parser.add_argument("--seconds", type=float, default=900.0, help="for one process")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where environments are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else is in the file of --json")
    arguments = parser.parse_args()
    cases = [case for case in SUITES[arguments.suite] if matches(case.name, arguments.only)]
    device = "cuda" if arguments.suite == "gpu" else "cpu"
    contenders = [one for one in CONTENDERS if device in one.devices and matches(one.name, arguments.contenders)]
    if not cases or not contenders:
        parser.error("no case or no contender has such a name")
    if arguments.quick:
        cases = [_quick(case) for case in cases if case.model == cases[0].model and case.sequence == cases[0].sequence]
    rounds = arguments.rounds or (1 if arguments.quick else 3 if device == "cpu" else 2)
    budget = arguments.budget or BUDGETS[arguments.suite]
    settings = Settings(
        arguments.cache.resolve(), device, rounds, arguments.seconds, budget, SHARES[arguments.suite], tuple(arguments.once)
    )
    driver = Driver(contenders, settings)
    found = _kept(arguments.json) if arguments.add else {}
    for case in cases:
        print(case.name, flush=True)
        load = os.getloadavg()
        measured = summary(driver.run(case, last=case is cases[-1]), _peak(device))
        print("\n".join(lines(measured)), flush=True)
        stamp_all(measured, {"date": today(), "load_before": load, "git": commit()})
        found[case.name] = added(found.get(case.name), measured)
        # Written after every case, so that what was measured survives an end.
        in_order = [found[case.name] for case in SUITES[arguments.suite] if case.name in found]
        write(arguments.json, {"suite": arguments.suite, "cases": in_order})


def _kept(path: Path | None) -> dict[str, dict[str, Any]]:
    """By name, the cases of a results file that is there already."""
    if path is None or not path.exists():
        return {}
    return {case["case"]["name"]: case for case in json.loads(path.read_text())["results"].get("cases", [])}


def _quick(case: Case) -> Case:
    return replace(case, blocks=2, block_steps=1)


def _peak(device: str) -> float | None:
    """Of the GPU in bf16, by its name."""
    if device == "cpu":
        return None
    import torch

    from jaxllm.metrics.chips import peak_flops

    return peak_flops(torch.cuda.get_device_name(), 1, "bf16") if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
