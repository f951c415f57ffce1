"""How a process finds the others: what SLURM, MPI, TPU pods and the command line say."""

from __future__ import annotations

import pytest

from jaxllm.errors import BackendError
from jaxllm.jax_backend.clusters import _tpu_pod, first_host, outer_rendezvous
from jaxllm.jax_backend.distributed import Rendezvous

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def alone(environment):
    return outer_rendezvous(None, None, None, {"JAX_PLATFORMS": "cpu", **environment})


def test_a_process_by_itself_has_no_others():
    assert alone({}) is None
    # A batch script of SLURM that was not started by srun, and one task.
    assert alone({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert alone({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_slurm():
    found = alone(SLURM)
    assert (found.index, found.count, found.local_device) == (9, 16, 1)
    host, port = found.coordinator.split(":")
    assert host == "gpu03"
    # The same for every task of the step, another one for the next step.
    assert alone({**SLURM, "SLURM_PROCID": "2"}).coordinator == found.coordinator
    assert alone({**SLURM, "SLURM_STEP_ID": "1"}).coordinator != found.coordinator
    assert 1024 < int(port) < 65536
    # One task on each node drives all its devices.
    assert alone({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x16)"}).local_device is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9],x", "gpu03"), ("r[1-2]-n", "r1-n"), ("a[7],b[1-2]", "a7")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_open_mpi():
    found = alone(OPEN_MPI)
    assert (found.index, found.count, found.local_device) == (3, 4, 1)
    assert found.coordinator.startswith("10.96.0.1:")
    # Version 5 names no address, which is needed as soon as there are several machines.
    newer = {key: value for key, value in OPEN_MPI.items() if "uri" not in key} | {"PMIX_NAMESPACE": "prterun-1"}
    with pytest.raises(BackendError, match="add --coordinator HOST:PORT"):
        alone(newer)
    assert alone({**newer, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).coordinator.startswith("127.0.0.1:")
    assert outer_rendezvous("10.0.0.1:99", None, None, newer) == Rendezvous("10.0.0.1:99", 3, 4, 1)


def test_mpich():
    mpich = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}
    with pytest.raises(BackendError, match="add --coordinator HOST:PORT"):
        alone(mpich)
    assert outer_rendezvous("h:99", None, None, mpich) == Rendezvous("h:99", 1, 2)
    assert alone({**mpich, "MPI_LOCALNRANKS": "2"}).local_device == 0


def test_tpu_pods():
    gke = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"}
    nothing = {}.get
    assert _tpu_pod(gke, None, nothing) == Rendezvous(None, 2, 4)
    assert _tpu_pod({**gke, "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, None, nothing) == Rendezvous(None, 6, 8)
    assert _tpu_pod({**gke, "TPU_WORKER_HOSTNAMES": "a"}, None, nothing) is None
    metadata = {"worker-network-endpoints": "u:8470:10.0.0.1,u:8470:10.0.0.2", "agent-worker-number": "1"}
    assert _tpu_pod({}, None, metadata.get) == Rendezvous(None, 1, 2)
    slices = {**metadata, "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"}
    assert _tpu_pod({}, None, slices.get) == Rendezvous(None, 3, 4)
    # Another Google Cloud machine, and a TPU machine that is to run on its CPU.
    assert _tpu_pod({}, None, nothing) is None
    assert _tpu_pod({**gke, "JAX_PLATFORMS": "cpu"}, None, nothing) is None


def test_the_command_line():
    assert outer_rendezvous("10.0.0.1:1234", 1, 2, {}) == Rendezvous("10.0.0.1:1234", 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 0, 2), "need --coordinator HOST:PORT"),
        (("a:1", 0, None), "go together"),
        (("a:1", None, None), "needs --process-index and --process-count"),
        (("nowhere", 0, 2), "--coordinator nowhere is not HOST:PORT"),
        (("a:1", 2, 2), "--process-index 2 is not one of 0 to 1"),
    ],
)
def test_what_does_not_come_together_is_refused(arguments, message):
    with pytest.raises(BackendError, match=message):
        outer_rendezvous(*arguments, {"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("place", [Rendezvous("a:1", 1, 2), Rendezvous(None, 6, 8), Rendezvous("a:1", 1, 2, local_device=0)])
def test_a_worker_is_told_its_place(place):
    assert Rendezvous.from_environment(place.environment()) == place
    assert Rendezvous.from_environment({}) is None
