"""Runs that the tests of trajectories and switches share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from jaxllm.config.schema import BackendName, Precision
from tests.parity.trajectories import FAMILIES, KINDS, MESHES, ONE, Trained, make_run, train

STEPS = 24


@dataclass(frozen=True)
class Zero:
    """What a group of DeepSpeed processes found.  folder: also holds states to go on with.  steps: of every run."""

    folder: Path
    steps: int

    def read(self, key: str) -> Trained:
        from tests.parity.zero_worker import read

        return read(self.folder / f"{key}.npz")


Run = Callable[..., Trained]


@pytest.fixture(scope="session")
def trained() -> Run:
    """Train a run of STEPS steps (or so many) on a backend in this process, once per session."""

    @cache
    def run(backend: BackendName, family: str, precision: Precision, mesh: str = "", steps: int = STEPS) -> Trained:
        return train(backend, make_run(family, precision, steps, MESHES[mesh] if mesh else ONE))

    return run


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Zero:
    """DeepSpeed at every stage over two processes."""
    return run_zero(tmp_path_factory.mktemp("zero"), STEPS, (*FAMILIES, *KINDS))


def run_zero(folder: Path, steps: int, families: Sequence[str] = FAMILIES) -> Zero:
    """Start the group; with FAMILIES it goes on with what JAX trained on a mesh."""
    from tests.parity import zero_worker

    for family in set(FAMILIES) & set(families):
        run = make_run(family, "fp32", steps, MESHES["data 2 x fsdp 2 x tensor 2"])
        train("jax", run, stop=steps // 2, keep=folder / f"switch-{family}")
    command = [sys.executable, "-W", "error", zero_worker.__file__, str(folder), str(steps), *families]
    group = {
        **os.environ,
        "WORLD_SIZE": str(zero_worker.PROCESSES),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    workers = [
        subprocess.Popen(command, env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(zero_worker.PROCESSES)
    ]
    assert [worker.wait() for worker in workers] == [0] * zero_worker.PROCESSES
    return Zero(folder, steps)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
