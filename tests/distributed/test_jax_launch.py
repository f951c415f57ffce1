"""The launcher of JAX processes with real workers: statuses, output, signals, and what happens when it is killed itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = "import sys; from jaxllm.jax_backend.launch import run_workers; sys.exit(run_workers(sys.argv[1:], 2))"
WORKER = """
import os, signal, sys, time
from pathlib import Path
from jaxllm.jax_backend.distributed import Rendezvous
rendezvous, folder = Rendezvous.from_environment(), Path(sys.argv[1])
index = rendezvous.index
"""


def start(script, folder):
    worker = folder / "worker.py"
    worker.write_text(WORKER + script)
    command = [sys.executable, "-c", LAUNCH, sys.executable, str(worker), str(folder)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_process_0_is_heard_and_the_others_are_not(tmp_path):
    run = start('print("I am", index, "of", rendezvous.count, "jax" in sys.modules)', tmp_path)
    assert (*run.communicate(timeout=120), run.returncode) == ("I am 0 of 2 False\n", "", 0)


def test_a_failing_worker_gives_its_status_and_its_words(tmp_path):
    script = """
if index == 1:
    sys.stderr.write("the disk of this node is full\\n")
    sys.exit(7)
(folder / "pid").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""
    run = start(script, tmp_path)
    assert (*run.communicate(timeout=120), run.returncode) == ("", "[process 1] the disk of this node is full\n", 7)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_sentence_that_every_process_says_is_shown_once(tmp_path):
    run = start('sys.stderr.write("training.steps: too many\\n"); sys.exit(1)', tmp_path)
    assert (*run.communicate(timeout=120), run.returncode) == ("", "training.steps: too many\n", 1)


def test_a_killed_worker_is_a_failure(tmp_path):
    run = start("os.kill(os.getpid(), signal.SIGKILL) if index == 1 else time.sleep(300)", tmp_path)
    _, errors = run.communicate(timeout=120)
    assert (errors, run.returncode) == ("[process 1] ended with status 137 without a word\n", 137)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_workers_finish(tmp_path, number):
    script = """
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
(folder / f"ready{index}").touch()
while not asked:
    time.sleep(0.01)
(folder / f"saved{index}").write_text(signal.Signals(asked[0]).name)
"""
    run = start(script, tmp_path)
    until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    run.send_signal(number)
    assert (*run.communicate(timeout=120), run.returncode) == ("", "", 0)
    assert [(tmp_path / f"saved{index}").read_text() for index in (0, 1)] == [number.name] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_workers_do_not_outlive_a_killed_launcher(tmp_path):
    script = """
(folder / f"pid{index}.new").write_text(str(os.getpid()))
(folder / f"pid{index}.new").rename(folder / f"pid{index}")
time.sleep(300)
"""
    run = start(script, tmp_path)
    until(lambda: (tmp_path / "pid0").exists() and (tmp_path / "pid1").exists())
    run.kill()
    run.communicate()
    until(lambda: not any(alive(int((tmp_path / f"pid{index}").read_text())) for index in (0, 1)))


def test_the_command_line_runs_in_every_process():
    code = "import sys; from jaxllm.jax_backend.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, "--version"], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("jaxllm ")
    assert run.stdout.count("\n") == 1
