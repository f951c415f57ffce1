"""The processes of a run: joining them, agreeing, and leaving."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from jaxllm.errors import BackendError
from jaxllm.torch_backend.libraries import import_deepspeed
from jaxllm.torch_backend.rendezvous import adopt_slurm, die_with_launcher, in_group

# What gloo and NCCL say of a process that is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Timed out waiting")


@contextmanager
def with_peers() -> Iterator[None]:
    """Within it (or in a function it decorates), the death of another process is a BackendError instead of a stack of calls."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        raise BackendError(
            "another process of the run has ended or is out of reach, and this one cannot go on without it; "
            "see what that process said, and go on from the newest checkpoint with --resume"
        ) from None


@dataclass(frozen=True)
class Group:
    """All processes of the run, and the device of this one.  `joined`: whether `close` must leave a torch process group."""

    rank: int
    world: int
    device: torch.device
    joined: bool

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all processes, in place (collective)."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process (collective)."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([int(flag)], device=self.device)).item())

    def barrier(self) -> None:
        """Return when every process has called this (collective)."""
        self.any(False)

    def close(self) -> None:
        """Leave the other processes."""
        if self.joined and distributed.is_initialized():
            import_deepspeed().comm.destroy_process_group()


def join() -> Group:
    """Join the group this process was started in, or a group of this process alone.

    A process group that the caller has already made is used and left as it is.
    """
    die_with_launcher()
    adopt_slurm()
    deepspeed = import_deepspeed()
    device = _device(int(os.environ.setdefault("LOCAL_RANK", "0")))  # DeepSpeed insists on the variable
    joined = False
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        if in_group():
            distributed.init_process_group(backend, device_id=device_id)
            joined = True
        else:
            store = distributed.HashStore()  # type: ignore[attr-defined]  # no port is opened for a process that is alone
            distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device_id)
            # Other backends of this process may use the group after this one is closed.
            atexit.register(_leave)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    _use_current_collectives(deepspeed.comm.comm.cdb)
    return Group(distributed.get_rank(), distributed.get_world_size(), device, joined)


def alone() -> Group:
    """A group of this process alone, without a torch process group: for what never talks to another process."""
    return Group(0, 1, _device(int(os.environ.get("LOCAL_RANK", "0"))), joined=False)


def _use_current_collectives(communicator: Any) -> None:
    """Give DeepSpeed the names torch has today for two collectives; the ones it looks up warn at every call."""
    if hasattr(distributed, "all_gather_single"):
        communicator.all_gather_function = distributed.all_gather_single
        communicator.reduce_scatter_function = distributed.reduce_scatter_single


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    """The accelerator of this process, or the CPU when there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
