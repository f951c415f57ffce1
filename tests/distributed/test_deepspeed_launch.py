"""The launcher with real workers: statuses, output, signals, and what happens when it is killed itself."""

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
LAUNCH = (
    "import sys; from jaxllm.torch_backend.launch import run_workers; sys.exit(run_workers(sys.argv[2:], int(sys.argv[1])))"
)

WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
"""


def _start(script: str, folder: Path, processes: int = 2) -> subprocess.Popen[str]:
    worker = folder / "worker.py"
    worker.write_text(WORKER + script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LAUNCH, str(processes), sys.executable, str(worker), str(folder)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _until(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_rank_0_is_heard_and_the_others_are_not(tmp_path: Path) -> None:
    run = _start('print("I am", rank, "of", os.environ["WORLD_SIZE"], os.environ["JAX_PLATFORMS"])', tmp_path)
    output, errors = run.communicate(timeout=120)
    assert (run.returncode, output, errors) == (0, "I am 0 of 2 cpu\n", "")


def test_a_failing_worker_gives_its_status_and_its_words(tmp_path: Path) -> None:
    script = """
if rank == 1:
    sys.stderr.write("the disk of this node is full\\n")
    sys.exit(7)
time.sleep(60)
"""
    run = _start(script, tmp_path)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 7
    assert errors == "[rank 1] the disk of this node is full\n"


def test_a_sentence_that_every_rank_says_is_shown_once(tmp_path: Path) -> None:
    script = """
(folder / f"here{rank}").touch()
while not ((folder / "here0").exists() and (folder / "here1").exists()):
    time.sleep(0.01)
sys.stderr.write("training.steps: too many\\n")
sys.exit(1)
"""
    run = _start(script, tmp_path)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert [line.removeprefix("[rank 1] ") for line in errors.splitlines()] == ["training.steps: too many"]


def test_a_killed_worker_is_a_failure(tmp_path: Path) -> None:
    run = _start("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)", tmp_path)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGKILL
    assert errors == (
        "error: process 1 of the run was killed by SIGKILL, as Linux does when memory runs out, and the others ended with it; "
        "go on from the newest checkpoint with --resume\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_workers_finish(tmp_path: Path, number: signal.Signals) -> None:
    script = """
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
(folder / f"ready{rank}").touch()
while not asked:
    time.sleep(0.01)
time.sleep(1.0)  # the step is finished and saved
(folder / f"saved{rank}").write_text(signal.Signals(asked[0]).name)
"""
    run = _start(script, tmp_path)
    _until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    run.send_signal(number)
    output, errors = run.communicate(timeout=120)
    assert (run.returncode, output, errors) == (0, "", "")
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_workers_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    script = """
from jaxllm.torch_backend.rendezvous import die_with_launcher
die_with_launcher()
(folder / f"pid{rank}").write_text(str(os.getpid()))
(folder / f"ready{rank}").touch()
time.sleep(300)
"""
    run = _start(script, tmp_path)
    _until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    workers = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    run.kill()
    run.communicate()
    _until(lambda: not any(_alive(pid) for pid in workers))


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_command_line_runs_in_every_worker() -> None:
    code = "import sys; from jaxllm.torch_backend.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, "--version"], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0
    assert run.stdout.startswith("jaxllm ")
    assert run.stdout.count("\n") == 1
