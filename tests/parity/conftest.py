"""Runs that the tests of trajectories and switches share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from jaxllm.config.schema import BackendName, Precision
from tests.parity.trajectories import FAMILIES, MESHES, ONE, Trained, make_run, train

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
    return run_zero(tmp_path_factory.mktemp("zero"), STEPS)


def run_zero(folder: Path, steps: int) -> Zero:
    """Start the group; it goes on with what JAX trained on a mesh."""
    from jaxllm.torch_backend.launch import run_workers
    from tests.parity import zero_worker

    for family in FAMILIES:
        run = make_run(family, "fp32", steps, MESHES["data 2 x fsdp 2 x tensor 2"])
        train("jax", run, stop=steps // 2, keep=folder / f"switch-{family}")
    root = Path(zero_worker.__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run_workers([sys.executable, zero_worker.__file__, str(folder), str(steps)], zero_worker.PROCESSES) == 0
    return Zero(folder, steps)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
