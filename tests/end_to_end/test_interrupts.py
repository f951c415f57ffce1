"""Stopping at any moment: signals save and exit with 0; kill -9 loses at most the steps since the last save."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from jaxllm.state.store import CheckpointStore
from tests.end_to_end.runs import Site, command, environment
from tests.end_to_end.test_resume import assert_same_bits


@contextmanager
def _started(site: Site, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`jaxllm ARGUMENTS` in a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command(arguments),
        cwd=site.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for_step(site: Site, name: str, step: int, process: subprocess.Popen[str]) -> None:
    metrics = site.path(name) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("backend", "arguments", "number"),
    [
        ("jax", (), signal.SIGTERM),
        ("jax", (), signal.SIGINT),
        ("deepspeed", (), signal.SIGINT),
        ("deepspeed", ("--processes", 2), signal.SIGTERM),
        ("jax", ("--processes", 2), signal.SIGTERM),
    ],
)
def test_a_signal_finishes_the_step_saves_and_exits_with_the_resume_command(
    site: Site, backend: str, arguments: tuple[object, ...], number: signal.Signals
) -> None:
    # Long enough that the signal always comes in the middle.
    config = site.write("stopped", training={"steps": 100_000}, evaluation={"every": None}, checkpoint={"every": None})
    with _started(site, "train", config, "--backend", backend, *arguments) as process:
        _wait_for_step(site, "stopped", 3, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    saved = CheckpointStore(site.path("stopped") / "checkpoints").steps()
    assert len(saved) == 1
    assert f"stopped after step {saved[0]} and saved; go on with: jaxllm train" in output
    assert "--resume" in output
    assert "Traceback" not in output
    assert max(site.losses("stopped")) == saved[0]


@pytest.mark.parametrize("backend", ["jax", "deepspeed"])
def test_kill_9_at_random_moments_loses_at_most_what_was_not_saved(
    shared_site: Site, finished: Callable[..., str], backend: str
) -> None:
    site, reference, name = shared_site, finished(backend), f"killed-{backend}"
    config = site.write(name, checkpoint={"every": 1, "keep": 3})
    moments = random.Random(backend)
    store = CheckpointStore(site.path(name) / "checkpoints")
    for kill in range(3):
        before = store.steps()
        with _started(site, "train", config, "--backend", backend, *(["--resume"] if kill else [])) as process:
            # At any point after the first step of this attempt: in a step, while writing, while renaming.
            _wait_for_step(site, name, 2 + 3 * kill, process)
            time.sleep(moments.uniform(0.0, 0.1))
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, output
        assert store.steps()[-1:] >= before[-1:]
    done = site.run("train", config, "--backend", backend, "--resume")
    assert "going on after step" in done.stdout
    assert_same_bits(site, name, reference)
    assert not list(store.folder.glob(".*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_group_with_a_sentence_and_the_run_resumes_on_one_process(site: Site, victim: int) -> None:
    name = f"lost-{victim}"
    long = {"steps": 100_000}
    config = site.write(name, checkpoint={"every": 1, "keep": 3}, training=long, deepspeed={"zero_stage": 2})
    with _started(site, "train", config, "--backend", "deepspeed", "--processes", 2) as process:
        _wait_for_step(site, name, 4, process)
        (worker,) = (
            child
            for child in psutil.Process(process.pid).children()
            if child.environ().get("TORCHELASTIC_RUN_ID") and child.environ()["RANK"] == str(victim)
        )
        worker.kill()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert f"process {victim} of the run was killed by SIGKILL" in output
    assert "--resume" in output
    assert "Traceback" not in output
    if victim == 0:
        return
    saved = CheckpointStore(site.path(name) / "checkpoints").steps()[-1]
    shorter = site.write(name, training={"steps": saved + 2})
    done = site.run("train", shorter, "--backend", "deepspeed", "--resume", "--allow-changed", "training.steps")
    assert f"going on after step {saved}" in done.stdout
    assert max(site.losses(name)) == saved + 2
