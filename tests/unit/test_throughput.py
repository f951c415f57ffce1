"""The throughput benchmark's bookkeeping; what it measures is measured by running it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fnmatch import fnmatch

import numpy as np
import pytest

from benchmarks.throughput.__main__ import _kept
from benchmarks.throughput.cases import CPU, GPU
from benchmarks.throughput.contenders import CONTENDERS, EAGER, JAXLLM_JAX, TARGETS
from benchmarks.throughput.driver import Driver, Entry, Found, Settings
from benchmarks.throughput.environments import last_line
from benchmarks.throughput.page import text_of
from benchmarks.throughput.prepared import prepare
from benchmarks.throughput.report import added, lines, stamp_all, summary
from benchmarks.throughput.workers import jaxllm_backend
from benchmarks.throughput.workers.protocol import Answer, Clock, Request


def answer(losses, seconds):
    return Answer(losses, seconds, 1.0, 2.0, 2**30, 2**20, {})


def found(*theirs):
    ours = Entry(JAXLLM_JAX, [answer((9.0, 8.0), (1.0, 1.1)), answer((9.0, 8.0), (0.9, 1.0))])
    return Found(CPU[0], [ours, *theirs], {"torch": 1e11, "jax": 2e11})


def test_ratios_are_of_rounds_that_are_next_to_each_other():
    slower = Entry(EAGER, [answer((9.0, 8.0), (2.0, 2.2)), answer((9.0, 8.0), (0.9, 1.0))])
    report = summary(found(slower), None)
    (ratio,) = report["ratios"]
    assert (ratio["of"], ratio["over"]) == (JAXLLM_JAX.name, EAGER.name)
    assert ratio["range"] == pytest.approx([1.0, 2.0])
    assert ratio["ratio"] == pytest.approx(1.5)
    assert ratio["reached"]
    assert report["contenders"][0]["tokens_per_s"] == CPU[0].tokens / 1.0
    assert report["limit_tokens_per_s"] == pytest.approx(CPU[0].tokens * 2e11 / report["model_flops_per_step"])


def test_who_does_less_is_named():
    report = summary(found(Entry(EAGER, [answer((9.0, 8.1), (0.1, 0.1))])), None)
    assert [row["same_work"] for row in report["contenders"]] == [True, False]
    assert "NOT THE SAME WORK" in "\n".join(lines(report))


def test_who_cannot_run_is_listed_with_the_reason():
    report = summary(found(Entry(EAGER, failure="pip install failed: ERROR: no such package")), None)
    assert "pip install failed" in "\n".join(lines(report))
    assert report["ratios"] == []
    assert last_line("Traceback\nValueError: what\n  more\n") == "ValueError: what"


def test_the_clock_sets_the_first_steps_apart(tmp_path):
    prepare(CPU[0], tmp_path)
    request = Request(str(tmp_path), "fp32", "cpu", compared=2, warmup=1, blocks=2, block_steps=3)
    clock = Clock(request)
    for number, tokens in enumerate(clock.batches()):
        assert tokens.shape == (CPU[0].rows, CPU[0].sequence + 1)
        clock.done(np.float32(number))
    made = clock.answer()
    assert number + 1 == request.steps
    assert made.losses == (0.0, 1.0)
    assert len(made.step_seconds) == 2
    run = jaxllm_backend.make_run(request)
    assert run.model.spec.vocab_size == CPU[0].model["vocab_size"]
    assert jaxllm_backend.make_batch(tokens).target_tokens == CPU[0].tokens


def test_names_of_targets_and_cases_are_there():
    names = {contender.name for contender in CONTENDERS}
    assert {name for first, second, _ in TARGETS for name in (first, second)} <= names
    assert sum(fnmatch(case.name, "10M-512-*") for case in CPU) == 2
    assert all(contender.options_for(case) is not None for contender in CONTENDERS for case in GPU)


@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name)
def test_choices_on_a_gpu_are_runs_that_jaxllm_takes(case, tmp_path):
    prepare(replace(case, model={**case.model, "num_hidden_layers": 1, "hidden_size": 192, "vocab_size": 99}), tmp_path)
    for contender in CONTENDERS:
        if contender.worker != "jaxllm_backend":
            continue
        options = contender.options_for(case)
        config = jaxllm_backend.make_run(Request(str(tmp_path), case.precision, "cuda", 1, 0, 1, 1, options)).config
        for section in ("jax", "deepspeed"):
            assert all(getattr(getattr(config, section), key) == value for key, value in options.get(section, {}).items())


def test_a_suite_that_was_not_run_says_so():
    text = "".join(text_of("GPU", {"results": {"not_run": "It has not been run.", "command": "python -m x"}}))
    assert "It has not been run. The command: `python -m x`" in text


def test_the_page_says_when_each_case_was_measured():
    case = summary(found(Entry(EAGER, [answer((9.0, 8.0), (2.0, 2.2))])), None)
    stamp_all(case, {"date": "2026-01-02", "load_before": [0.1, 0.2, 0.3], "git": None})
    text = "".join(text_of("CPU", {"machine": {"cpu": "a processor", "cpus": 2}, "results": {"cases": [case]}}))
    row = next(line for line in text.splitlines() if line.startswith(f"| {JAXLLM_JAX.name} |")).split(" | ")
    assert row[2] == "2026-01-02, 2 x"
    assert f"{JAXLLM_JAX.name} / {EAGER.name}: 2.00 (2.00 to 2.00, one round); wanted 1.0: reached" in text
    assert float(row[5]) == pytest.approx(found_share(), abs=0.005)


def found_share():
    report = summary(found(), None)
    return report["contenders"][0]["tokens_per_s"] / report["limit_tokens_per_s"]


class Counted(Driver):
    """A driver whose processes are counted, and take no time."""

    def __init__(self, contenders, settings, now):
        self.started, self.now = [], now
        super().__init__(contenders, settings)

    def _process(self, _python, worker, _request, _seconds):
        self.started.append(worker)
        self.now[0] += 10.0
        return {"torch": 1e11} if worker == "matmul" else asdict(answer((9.0,), (1.0,)))


def counted(monkeypatch, tmp_path, **settings):
    now = [0.0]
    monkeypatch.setattr("benchmarks.throughput.driver.time.monotonic", lambda: now[0])
    monkeypatch.setattr("benchmarks.throughput.driver.python_of", lambda *_: tmp_path)
    wanted = {"rounds": 3, "seconds": 60.0, "budget": 1000.0, **settings}
    return Counted((JAXLLM_JAX, EAGER), Settings(tmp_path, "cpu", **wanted), now)


def test_contenders_take_turns_and_slow_ones_may_run_once(monkeypatch, tmp_path):
    driver = counted(monkeypatch, tmp_path, once=("torch*",))
    entries = driver.run(CPU[0], last=True).entries
    assert driver.started == ["matmul", "jaxllm_backend", "torch_loop", "jaxllm_backend", "jaxllm_backend"]
    assert [len(entry.answers) for entry in entries] == [3, 1]


def test_a_case_leaves_time_for_those_after_it(monkeypatch, tmp_path):
    driver = counted(monkeypatch, tmp_path, budget=80.0, share=0.5)
    first, second = driver.run(CPU[0], last=False).entries, driver.run(CPU[0], last=True).entries
    assert [len(entry.answers) for entry in first] == [2, 1]  # 40 of 80 seconds, 10 of them for products
    assert [len(entry.answers) for entry in second] == [2, 1]
    late = driver.run(CPU[0], last=True)
    assert all(entry.failure.startswith("not started") for entry in late.entries)


def test_contenders_of_other_runs_are_kept():
    old = summary(found(Entry(EAGER, [answer((9.0, 8.0), (2.0, 2.2))])), None)
    stamp_all(old, {"date": "old"})
    new = summary(Found(CPU[0], [Entry(EAGER, [answer((9.0, 8.0), (4.0,))])], {"torch": 1e11}), None)
    stamp_all(new, {"date": "new"})
    both = added(old, new)
    assert {row["name"]: row["measured"]["date"] for row in both["contenders"]} == {JAXLLM_JAX.name: "old", EAGER.name: "new"}
    assert [ratio["measured"]["date"] for ratio in both["ratios"]] == ["old"]
    assert both["limit_tokens_per_s"] == new["limit_tokens_per_s"]
    assert added(None, new) is new


def test_cases_of_other_runs_are_kept(tmp_path):
    assert _kept(None) == _kept(tmp_path / "none.json") == {}
    case = summary(found(), None)
    (tmp_path / "results.json").write_text(json.dumps({"results": {"cases": [case]}}))
    assert _kept(tmp_path / "results.json")[CPU[0].name]["model_flops_per_step"] == case["model_flops_per_step"]
