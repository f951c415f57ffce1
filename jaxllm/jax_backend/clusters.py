"""Who else started this command: SLURM, MPI, a TPU pod, or a person on every host, by hand.

Nothing here loads JAX: the process that reads this only starts the one that does.
"""

from __future__ import annotations

import os
import re
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from jaxllm.errors import BackendError
from jaxllm.jax_backend.distributed import Rendezvous

_FIRST_PORT, _PORTS = 20000, 20000
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_METADATA_SECONDS = 3.0


def outer_rendezvous(
    coordinator: str | None, index: int | None, count: int | None, environment: Mapping[str, str] = os.environ
) -> Rendezvous | None:
    """How this process meets the others that were started with it, or None when it was started alone.

    coordinator (host:port of process 0), index, count: what the command line says; what it leaves out comes from the launcher.
    BackendError when it does not come together.
    """
    if index is not None and count is not None:
        if coordinator is None:
            raise BackendError("--process-index and --process-count need --coordinator HOST:PORT, an address of process 0")
        return _checked(Rendezvous(coordinator, index, count))
    if (index is None) != (count is None):
        raise BackendError("--process-index and --process-count go together; give both, or leave both to SLURM or MPI")
    launchers = (_slurm, _open_mpi, _pmi, _tpu_pod)
    found = next((found for launcher in launchers if (found := launcher(environment, coordinator))), None)
    if found is None and coordinator is not None:
        raise BackendError("--coordinator needs --process-index and --process-count, as neither SLURM nor MPI started this")
    return found if coordinator is None else _checked(found)


def _checked(rendezvous: Rendezvous | None) -> Rendezvous | None:
    if rendezvous is None:
        return None
    host, _, port = (rendezvous.coordinator or "").rpartition(":")
    if not host or not port.isdigit():
        raise BackendError(f"--coordinator {rendezvous.coordinator} is not HOST:PORT, for example 10.0.0.1:1234")
    if not 0 <= rendezvous.index < rendezvous.count:
        raise BackendError(f"--process-index {rendezvous.index} is not one of 0 to {rendezvous.count - 1}")
    return rendezvous


def _slurm(environment: Mapping[str, str], coordinator: str | None) -> Rendezvous | None:
    """srun: it alone sets SLURM_STEP_NUM_TASKS; the variables of the batch script itself describe no group of processes."""
    count = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if count < 2 or "SLURM_PROCID" not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    step = f"{environment.get('SLURM_JOB_ID', '0')}.{environment.get('SLURM_STEP_ID', '0')}"
    on_this_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    alone = on_this_node is None or int(on_this_node[0]) == 1
    local = None if alone else int(environment.get("SLURM_LOCALID", "0"))
    return Rendezvous(coordinator or f"{first_host(nodes)}:{_port(step)}", int(environment["SLURM_PROCID"]), count, local)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],x` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def _open_mpi(environment: Mapping[str, str], coordinator: str | None) -> Rendezvous | None:
    """Open MPI's mpirun."""
    count = int(environment.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count < 2:
        return None
    index, on_this_node = int(environment["OMPI_COMM_WORLD_RANK"]), int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    local = None if on_this_node == 1 else int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    job = environment.get("OMPI_MCA_orte_hnp_uri") or environment.get("PMIX_NAMESPACE", "0")
    coordinator = coordinator or f"{_mpi_host(environment, on_this_node == count)}:{_port(job)}"
    return Rendezvous(coordinator, index, count, local)


def _mpi_host(environment: Mapping[str, str], one_machine: bool) -> str:
    """The machine of process 0, where mpirun itself runs."""
    if one_machine:
        return "127.0.0.1"
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if address is None:
        raise BackendError("this MPI does not say where process 0 runs; add --coordinator HOST:PORT with an address of it")
    return address[1] or f"[{address[2]}]"


def _pmi(environment: Mapping[str, str], coordinator: str | None) -> Rendezvous | None:
    """The mpiexec of MPICH or Intel MPI."""
    count = int(environment.get("PMI_SIZE", "1"))
    if count < 2 or "PMI_RANK" not in environment:
        return None
    on_this_node = int(environment.get("MPI_LOCALNRANKS", "1"))
    local = None if on_this_node == 1 else int(environment.get("MPI_LOCALRANKID", "0"))
    # It names no host; without --coordinator only processes of one machine can meet.
    if on_this_node < count and not coordinator:
        raise BackendError("this MPI does not say where process 0 runs; add --coordinator HOST:PORT with an address of it")
    job = environment.get("PMI_PORT") or str(os.getppid())
    return Rendezvous(coordinator or f"127.0.0.1:{_port(job)}", int(environment["PMI_RANK"]), count, local)


def _tpu_pod(
    environment: Mapping[str, str], coordinator: str | None, metadata: Callable[[str], str | None] | None = None
) -> Rendezvous | None:
    """A TPU pod slice, or several: one process on every host.  JAX itself finds the coordinator."""
    if environment.get("JAX_PLATFORMS", "tpu") != "tpu" or not (metadata or _has_tpu()):
        return None
    ask = metadata or _metadata
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    index = environment.get("TPU_WORKER_ID")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in environment:
        hosts, index = ask("worker-network-endpoints"), ask("agent-worker-number")
    if not hosts or index is None:
        return None
    of_slice = len(hosts.split(","))
    slices, slice_index = (int(_tpu_value(environment, ask, name) or default) for name, default in _SLICES)
    if of_slice * slices == 1:
        return None
    return Rendezvous(coordinator, int(index) + slice_index * of_slice, of_slice * slices)


_SLICES = (("MEGASCALE_NUM_SLICES", 1), ("MEGASCALE_SLICE_ID", 0))


def _tpu_value(environment: Mapping[str, str], ask: Callable[[str], str | None], name: str) -> str | None:
    if name in environment or "TPU_SKIP_MDS_QUERY" in environment:
        return environment.get(name)
    found = re.search(rf"^\s*{name}\s*:\s*'?([^'\n]*)", ask("tpu-env") or "", re.MULTILINE)
    return found[1].strip() if found else None


def _has_tpu() -> bool:
    nodes = (node for pattern in ("accel[0-9]*", "vfio/[0-9]*") for node in Path("/dev").glob(pattern))
    return find_spec("libtpu") is not None and any(True for _ in nodes)


def _metadata(key: str) -> str | None:
    """An attribute of this Google Cloud machine; None elsewhere."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:  # noqa: S310
            return str(answer.read().decode())
    except OSError:
        return None


def _port(job: str) -> int:
    """A port that every process of a job derives alike; two jobs on one machine derive different ones, mostly."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
