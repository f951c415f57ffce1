"""Whether this process was started as one of several, and by whom.

torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_* instead,
from which the same five follow.  This module imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

RUN_ID_PREFIX = "jaxllm-"  # of the groups that `jaxllm.torch_backend.launch` starts
_FIRST_PORT, _PORTS = 15000, 20000


def in_group() -> bool:
    """Whether torchrun, the deepspeed launcher or srun started this process as one of a group, which it then joins."""
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or _under_srun()


def adopt_slurm() -> None:
    """Under srun, set what torch's `env://` rendezvous reads.  Nothing is done for a process of another launcher."""
    if "RANK" in os.environ or not _under_srun():
        return
    step = f"{os.environ.get('SLURM_JOB_ID', '0')}.{os.environ.get('SLURM_STEP_ID', '0')}"
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "localhost"
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    # Every process of a job step derives the same port; two steps on one node derive different ones.
    job, number = (int(part) if part.isdigit() else 0 for part in step.split("."))
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + (job * 31 + number) % _PORTS))


def die_with_launcher() -> None:
    """Let the kernel end this worker when the `launch` that started it is killed; otherwise it would train on, unseen."""
    if sys.platform != "linux" or not os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _under_srun() -> bool:
    # srun alone sets SLURM_STEP_NUM_TASKS; the variables of the batch script itself describe no group of processes.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],x` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        return nodes
    stem, number, rest = match.groups()
    return stem + (number or "") + (rest or "")
