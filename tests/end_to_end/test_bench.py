"""`jaxllm bench`: the same work on both backends, its numbers, and its traces."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from jaxllm.parity.tolerances import TOLERANCES, relative_error
from tests.end_to_end.runs import Site

pytest.importorskip("deepspeed", reason="the other backend")

STEPS, WARMUP = 5, 1
COUNT = 1 + WARMUP + 2 * STEPS


def test_both_backends_measure_the_same_work(site: Site) -> None:
    file = site.write("bench", schedule={"kind": "constant", "warmup_steps": 0})
    reports = {}
    for backend, more in (("jax", ()), ("deepspeed", ("--processes", 2))):
        out = site.folder / f"{backend}.json"
        done = site.run("bench", file, "--backend", backend, "--steps", STEPS, "--warmup", WARMUP, "--json", out, *more)
        assert done.stdout.count("tokens/s") == 1, "one process of a group prints"
        reports[backend] = json.loads(out.read_text())
    losses = [report["measured"]["losses"] for report in reports.values()]
    assert [len(each) for each in losses] == [COUNT, COUNT]
    assert relative_error(losses[0], losses[1]) <= TOLERANCES["fp32"].trajectory_loss
    for report in reports.values():
        measured = report["measured"]
        assert measured["tokens_per_second"] == pytest.approx(8 * 48 / measured["step_seconds"])
        assert measured["fastest"] <= measured["step_seconds"] <= measured["slowest"]
        assert all(seconds > 0 for seconds in measured["split"].values())
        assert measured["start_seconds"] > measured["compile_seconds"] >= 0
        assert measured["memory_bytes"] > 2**20
    assert not site.path("bench").exists(), "nothing is left behind"


@pytest.mark.parametrize("backend", ["jax", "deepspeed"])
def test_a_trace_holds_the_steps(site: Site, backend: str) -> None:
    file, folder = site.write("traced"), site.folder / f"trace-{backend}"
    site.run("bench", file, "--backend", backend, "--steps", 1, "--warmup", 0, "--profile", folder)
    (trace,) = [
        path
        for pattern in ("**/*trace.json.gz", "**/*.pt.trace.json")
        for path in folder.glob(pattern)
        if "perfetto" not in path.name
    ]
    text = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    events = json.loads(text)["traceEvents"]
    named = {str(event.get("name", "")) for event in events}
    assert any(("dot" if backend == "jax" else "aten::mm") in name for name in named), sorted(named)[:50]
    assert math.isfinite(sum(float(event.get("dur", 0)) for event in events))
