"""A small T5 learns to translate Multi30k's captions from scratch on both backends: loss, chrF, BLEU, how far they are apart.

    python -m benchmarks.t5_multi30k FOLDER [--backend jax|deepspeed|both] [--precision fp32|fp64] [--control] [--last STEP]
        [--runs RUNS] [--set A.B=C] [--json OUT]

FOLDER holds train.en, train.de (29,000 lines) and val.en, val.de (1,014).  Each backend is `jaxllm train` on
benchmarks/t5_multi30k.yaml in a fresh process, then `jaxllm eval --beams 4` of the run's checkpoints after a third of the first
epoch, after all of it, and after the last.  There is no dropout and the seeds are equal, so that both do the same arithmetic.
Bounds: loss and chrF are better after the first epoch than after a third of it, and the backends are within 1 % of each other's
loss and within 1 point of each other's chrF.

In fp32 the backends write other words for most sources: each rounds in its own order, and training amplifies that.
`--precision fp64` tells this from a mistake.  Its roundings are 2e-9 times as large; after a third of an epoch, when most
targets differ in fp32, all are to be the same.  In the end training amplifies these, too; how fast, `--control` shows:
JAX against itself with half the micro-batch, which is the same sums in another order.

`--last STEP` ends the runs there; their schedule stays that of three epochs.  `--runs` keeps them in a folder and goes on with
what it holds; without it nothing stays.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import write
from jaxllm.metrics.sinks import parse_metrics

FILE = Path(__file__).with_suffix(".yaml")
STEPS = (151, 453, 1359)
LOSS, CHRF = 0.01, 1.0
SAME_TARGETS = ("fp64", STEPS[0])
"""Where the backends are to write the same for every source."""
CONTROL = "training.micro_batch=32"


def settings(data: Path, folder: Path, overrides: list[str]) -> list[str]:
    """What is changed of the run file: where data and results are."""
    given = [
        *(f"data.{source}.{files}={data / f'{name}.{language}'}"
          for source, name in (("source", "train"), ("validation_source", "val"))
          for files, language in (("files", "en"), ("target_files", "de"))),
        f"output_dir={folder}",
        f"data.cache_dir={folder / 'data'}",
        *overrides,
    ]  # fmt: skip
    return [part for setting in given for part in ("--set", setting)]


def train(command: list[str], run: Path, last: int) -> None:
    """Until the run has saved what it has learnt in `last` steps; before its own end it is ended as by Ctrl-C."""
    saved = run / "checkpoints" / f"step-{last:08d}"
    if saved.exists():
        return
    process = subprocess.Popen(command)
    while process.poll() is None:
        if saved.exists() and last < STEPS[-1]:
            process.send_signal(signal.SIGINT)
            process.wait()
            return
        time.sleep(1.0)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def measure(name: str, data: Path, folder: Path, last: int, overrides: list[str]) -> dict[str, Any]:
    """Train once and evaluate what came out.  name: a backend, or `control`."""
    jaxllm, run = [sys.executable, "-m", "jaxllm"], folder / name
    if name == "control":
        overrides = [*overrides, CONTROL]
    backend = "jax" if name == "control" else name
    command = [*jaxllm, "train", str(FILE), "--resume", "--backend", backend, "--set", f"name={name}"]
    train([*command, *settings(data, folder, overrides)], run, last)
    records = [each for each in parse_metrics((run / "metrics.jsonl").read_text()) if each["step"] <= last]
    seconds = max(each["seconds"] for each in records if each["split"] == "train")
    evaluations = {step: _evaluation([*jaxllm, "eval", str(run)], folder / f"{name}-{step}", step) for step in until(last)}
    return {"seconds": seconds, "evaluations": evaluations, "records": records}


def _evaluation(command: list[str], stem: Path, step: int) -> dict[str, Any]:
    """Of a checkpoint: loss, scores, and what it writes.  stem: of the files with the results, which may be there already."""
    out, written = stem.with_suffix(".json"), stem.with_suffix(".jsonl")
    if not out.exists():
        options = ["--step", str(step), "--beams", "4", "--json", str(out), "--written", str(written)]
        subprocess.run([*command, *options], check=True)
    examples = [json.loads(line) for line in written.read_text().splitlines()]
    found = json.loads(out.read_text())
    texts = [each["written"] for each in examples]
    return {"loss": found["loss"], **found["measures"]["values"], "examples": examples[:3], "written": texts}


def until(last: int) -> tuple[int, ...]:
    """The steps after which is measured."""
    return tuple(step for step in STEPS if step <= last)


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """After each of the steps: relative differences of the losses, of the scores, and share of other translations.

    loss: on the validation data; training_loss: the largest of those logged until then.
    """
    found = {}
    logged = [{each["step"]: each["loss"] for each in side["records"] if each["split"] == "train"} for side in (one, other)]
    errors = {step: abs(logged[0][step] - logged[1][step]) / logged[1][step] for step in logged[0].keys() & logged[1].keys()}
    for step in one["evaluations"]:
        first, second = one["evaluations"][step], other["evaluations"][step]
        different = sum(a != b for a, b in zip(first["written"], second["written"], strict=True))
        found[str(step)] = {
            "loss": abs(first["loss"] - second["loss"]) / second["loss"],
            "training_loss": max(error for logged_at, error in errors.items() if logged_at <= step),
            "chrf": abs(first["chrf"] - second["chrf"]),
            "bleu": abs(first["bleu"] - second["bleu"]),
            "other_translations": different / len(first["written"]),
        }
    return found


def _said(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", choices=["jax", "deepspeed", "both"], default="both")
    parser.add_argument("--precision", choices=["fp32", "fp64"], default="fp32")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--last", type=int, choices=STEPS, default=STEPS[-1])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    backends = ["jax", "deepspeed"] if arguments.backend == "both" else [arguments.backend]
    overrides = [f"training.precision={arguments.precision}", *arguments.overrides]
    with tempfile.TemporaryDirectory() as made:
        runs = (arguments.runs or Path(made)).resolve()
        names = [*backends, *(["control"] if arguments.control else [])]
        sides = {name: measure(name, arguments.folder.resolve(), runs, arguments.last, overrides) for name in names}
    results: dict[str, Any] = {"precision": arguments.precision}
    for key, other in (("apart", "deepspeed"), ("control_apart", "control")):
        if {"jax", other} <= sides.keys():
            results[key] = apart(sides["jax"], sides[other])
    for name, side in sides.items():
        for step, found in side["evaluations"].items():
            del found["written"]
            scores = ", ".join(f"{measure} {found[measure]:.4g}" for measure in ("loss", "chrf", "bleu", "rougeL"))
            print(f"{name} after step {step}: {scores}")
        if arguments.last > STEPS[0]:
            early, epoch = (side["evaluations"][step] for step in STEPS[:2])
            better = epoch["loss"] < early["loss"] and epoch["chrf"] > early["chrf"]
            print(f"{name}: loss and chrF {'are' if better else 'are NOT'} better after the first epoch")
        print(f"{name}: {side['seconds']:.0f} s")
        results[name] = side
    for step, found in results.get("apart", {}).items():
        same = found["other_translations"] == 0 or (arguments.precision, int(step)) != SAME_TARGETS
        held = found["loss"] <= LOSS and found["chrf"] <= CHRF and same
        print(f"JAX against DeepSpeed after step {step}: {_said(found)} ({'within' if held else 'NOT within'} the bounds)")
    for step, found in results.get("control_apart", {}).items():
        print(f"JAX against JAX in another order after step {step}: {_said(found)}")
    write(arguments.json, results)


if __name__ == "__main__":
    main()
