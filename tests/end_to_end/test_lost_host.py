"""A run of two hosts, one of which dies: the other says so and ends, and the run goes on alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxllm.jax_backend.distributed import Rendezvous
from jaxllm.state.store import CheckpointStore
from tests.end_to_end.runs import environment

# A host of the run, and one that is impatient.  Without the launcher, which would end it.
HOST = "import sys; from jaxllm.cli.main import main; main(sys.argv[1:])"
IMPATIENT = "from jaxllm.jax_backend import peers; peers.INTERVAL, peers.SILENCE = 0.5, 10.0; " + HOST
# The same started as srun would start it, with the launcher that stays behind.
SUPERVISED = (
    "import sys; from jaxllm.jax_backend import launch; sys.exit(launch.launch_one(sys.argv[1:], launch.Rendezvous(%r, 1, 2)))"
)


@pytest.fixture
def two_hosts(site):
    """`two_hosts(codes)`: both hosts of a run, four devices each, once it has saved a checkpoint; killed afterwards."""
    hosts = []

    def start(name, codes, coordinator):
        config = site.write(
            name,
            training={"steps": 100_000, "global_batch": 8, "micro_batch": None},
            parallel={"data": 1, "fsdp": 8},
            jax={"cpu_devices": 4},
            evaluation={"every": None},
            checkpoint={"every": 2, "keep": 2},
        )
        for index, code in enumerate(codes):
            hosts.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, "train", str(config)],
                    cwd=site.folder,
                    env={**environment(), "JAX_PLATFORMS": "cpu", **Rendezvous(coordinator, index, 2).environment()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        store = CheckpointStore(site.path(name) / "checkpoints")
        deadline = time.monotonic() + 240
        while not store.steps() and all(host.poll() is None for host in hosts):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return config, hosts

    yield start
    for host in hosts:
        with host:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)


@pytest.fixture
def coordinator():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_lost_host_ends_the_run_which_goes_on_in_one_process(site, two_hosts, coordinator):
    config, hosts = two_hosts("lost", [IMPATIENT, IMPATIENT], coordinator)
    os.killpg(hosts[1].pid, signal.SIGKILL)
    _, said = hosts[0].communicate(timeout=120)
    assert hosts[0].returncode == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "process 1 of 2 has given no sign of life for" in lines[0]
    assert lines[0].endswith("go on from the newest checkpoint with --resume")
    assert "Traceback" not in said
    saved = CheckpointStore(site.path("lost") / "checkpoints").steps()[-1]
    resumed = ("--set", f"training.steps={saved + 2}", "--set", "parallel.fsdp=4", "--allow-changed", "training")
    done = site.run("train", config, "--resume", *resumed)
    assert f"going on after step {saved}" in done.stdout
    assert max(site.losses("lost")) == saved + 2


def test_when_process_0_is_lost_the_launcher_of_the_other_says_so(two_hosts, coordinator):
    _, hosts = two_hosts("leaderless", [HOST, SUPERVISED % coordinator], coordinator)
    os.killpg(hosts[0].pid, signal.SIGKILL)
    _, said = hosts[1].communicate(timeout=120)
    assert hosts[1].returncode == 128 + signal.SIGABRT
    assert said.startswith("[process 1] error: process 0, where the others meet, has ended or cannot be reached; ")
    assert said.count("\n") == 1
