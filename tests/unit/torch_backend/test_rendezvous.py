"""Who started this process."""

from __future__ import annotations

import os

import pytest

from jaxllm.torch_backend.rendezvous import adopt_slurm, first_host, in_group

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in TORCH or name.startswith("SLURM_"):
            # Set before it is deleted, so that what the code under test sets is taken away afterwards.
            monkeypatch.delenv(name)
    for name in TORCH:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_process_of_its_own() -> None:
    assert not in_group()
    adopt_slurm()
    assert "RANK" not in os.environ


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert in_group()


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert in_group()
    adopt_slurm()
    found = {name: os.environ[name] for name in TORCH[:4]}
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert 15000 <= int(os.environ["MASTER_PORT"]) < 35000


def test_torchrun_inside_slurm_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    adopt_slurm()
    assert os.environ["WORLD_SIZE"] == "2"


def test_a_batch_script_is_not_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside sbatch, before srun, the job's variables are set but there are no sibling processes."""
    for name, value in {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert not in_group()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("host", "host"),
        ("a1,a2", "a1"),
        ("gpu[03-05,9],x", "gpu03"),
        ("rack[2,4]-node", "rack2-node"),
        ("tpu-[001-128].cluster,other", "tpu-001.cluster"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
