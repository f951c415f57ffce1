"""How the processes of a run are laid out over `parallel`: which rows, tokens and shards of tensors each of them has.

Ranks run over (data x fsdp, context, tensor), the last fastest, so that the processes of a tensor group, which talk most, are
neighbours.  ZeRO sees the processes that have the same shard of every tensor, all data x fsdp x context of them, as replicas:
it sums their gradients and shards its states over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from jaxllm.config.batch import data_parallel
from jaxllm.config.schema import ParallelConfig
from jaxllm.data.batch import Shard
from jaxllm.torch_backend.group import Group


@dataclass(frozen=True)
class Mesh:
    """The processes of a run as a mesh, and this process's place in it.

    data: groups of processes that read different rows, data x fsdp.  context: processes that share a row, each with its own
    tokens.  tensor: processes that share every layer's heads and MLP.  The groups are torch process groups, None where an axis
    has one process, or (replica_group) all of them.
    """

    group: Group
    data: int = 1
    context: int = 1
    tensor: int = 1
    replica_group: Any = None
    context_group: Any = None
    tensor_group: Any = None

    @property
    def replicas(self) -> int:
        """Processes whose gradients add up: data x context."""
        return self.data * self.context

    @property
    def tensor_index(self) -> int:
        """Which shard of the tensors this process has."""
        return self.group.rank % self.tensor

    @property
    def replica_index(self) -> int:
        """This process among those with the same shard of the tensors."""
        return self.group.rank // self.tensor

    @property
    def context_index(self) -> int:
        """Which tokens of its rows this process has."""
        return self.replica_index % self.context

    @property
    def shard(self) -> Shard:
        """The rows this process reads: the same on all processes of a context and of a tensor group."""
        return Shard(self.replica_index // self.context, self.data)

    def tokens(self, sequence_length: int) -> slice:
        """The columns of its rows that this process computes."""
        part = sequence_length // self.context
        return slice(self.context_index * part, (self.context_index + 1) * part)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed, in place, over the replicas: over everything the batch was split into (collective)."""
        if self.replicas > 1:
            distributed.all_reduce(values, group=self.replica_group)
        return values

    def sum_shards(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed, in place, over the processes that share each layer's tensors (collective)."""
        if self.tensor > 1:
            distributed.all_reduce(values, group=self.tensor_group)
        return values

    def close(self) -> None:
        """Forget the process groups, so that a later mesh of this process can be another."""
        if self.context_group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self.context_group)
        if self.tensor > 1:
            _forget_tensor_groups()


def single(group: Group) -> Mesh:
    """A mesh of one process, for what never talks to another."""
    return Mesh(group)


def make_mesh(group: Group, parallel: ParallelConfig) -> Mesh:
    """The mesh of all processes (collective).  `jaxllm.torch_backend.combinations` has checked that it fits."""
    data, context, tensor = data_parallel(parallel, group.world), parallel.context, parallel.tensor
    replica_group, tensor_group = _tensor_groups(tensor) if tensor > 1 else (None, None)
    context_group = _context_group(group.rank, data, context, tensor) if context > 1 else None
    return Mesh(group, data, context, tensor, replica_group, context_group, tensor_group)


def _tensor_groups(tensor: int) -> tuple[Any, Any]:
    """The groups of replicas and of shards that DeepSpeed itself makes and uses."""
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=tensor)  # noqa: SLF001 - the engine calls it by this name too
    return groups.get_data_parallel_group(), groups.get_tensor_model_parallel_group()


def _context_group(rank: int, data: int, context: int, tensor: int) -> Any:
    """This process's context group; every process takes part in making every group."""
    mine = None
    for row in range(data):
        for shard in range(tensor):
            ranks = [(row * context + part) * tensor + shard for part in range(context)]
            made = distributed.new_group(ranks)
            mine = made if rank in ranks else mine
    return mine


def _forget_tensor_groups() -> None:
    """DeepSpeed keeps its groups in its module for ever; the next engine of this process may want others, or none."""
    from deepspeed.utils import groups

    groups.mpu = None
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP"):
        setattr(groups, name, None)
