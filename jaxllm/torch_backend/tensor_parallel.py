"""AutoTP: DeepSpeed's tensor parallelism for transformers models, and where each process's shard of a tensor lies.

Queries, keys, values, gate, up and the output head are split by rows of their weight, the two projections back to the residual
by columns, as the model's own `tp_plan` says.  Embeddings, norms, and a head that is tied to the embedding stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import distributed

from jaxllm.errors import BackendError
from jaxllm.state.training_state import Array, TensorReader
from jaxllm.torch_backend.mesh import Mesh
from jaxllm.torch_backend.transfer import Kind, Store


@dataclass(frozen=True)
class Split:
    """How one tensor is cut along `dim`: sizes, one for each process of a tensor group; index: this process's."""

    dim: int
    sizes: tuple[int, ...]
    index: int

    @property
    def range(self) -> slice:
        """This process's part of the dimension."""
        start = sum(self.sizes[: self.index])
        return slice(start, start + self.sizes[self.index])


def split_model(model: Any, mesh: Mesh) -> dict[str, Split]:
    """Replace the layers of a transformers.PreTrainedModel by ones that hold this process's shard; the cuts, by name.

    BackendError when transformers has no plan for the model, or one that AutoTP does not know.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig
    from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info, set_autotp_mode
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan

    try:
        specs = TPPlanConverter.convert(_get_hf_tp_plan(model))
    except ValueError as error:
        raise BackendError(f"parallel.tensor: AutoTP cannot split {type(model).__name__}: {error}") from error
    if specs is None:
        raise BackendError(f"parallel.tensor: transformers has no tensor-parallel plan for {type(model).__name__}")
    set_autotp_mode(training=True)
    autotp = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(torch.nn.Linear, torch.nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig(tp_size=mesh.tensor, layer_specs=specs),
        model_config=model.config,
        training_mode=True,
    )
    autotp.set_tensor_parallel_config(mesh.tensor, mesh.tensor_group)
    autotp.update_linear_policies()
    autotp._replace_module(model)  # noqa: SLF001 - what the engine calls; jaxllm does so earlier, to know the parameters
    with redirect_stdout(StringIO()):  # it says how many, for every model
        autotp.register_replicated_grad_hooks(model)
    collect_autotp_universal_checkpoint_info(model)  # completes the layouts
    model.ds_autotp_parsed = True  # the engine leaves the model as it is
    return {name: split for name, p in model.named_parameters() if (split := _split_of(p, mesh)) is not None}


def _split_of(parameter: torch.nn.Parameter, mesh: Mesh) -> Split | None:
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    layout = getattr(parameter, DS_AUTOTP_UC_META, None)
    if layout is None or layout["partition_dim"] is None:
        return None
    return Split(layout["partition_dim"], tuple(layout["partition_sizes"]), mesh.tensor_index)


class PartReader:
    """This process's shard of every tensor, seen as a TensorReader of its own."""

    def __init__(self, whole: TensorReader, splits: Mapping[str, Split]) -> None:
        self._whole = whole
        self._splits = splits

    def names(self) -> Sequence[str]:
        return self._whole.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, split = list(self._whole.shape(name)), self._splits.get(name)
        if split is not None:
            shape[split.dim] = split.sizes[split.index]
        return tuple(shape)

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        split = self._splits.get(name)
        if split is None:
            return self._whole.read(name, index)
        shape = self.shape(name)
        within = [slice(0, size) for size in shape] if index is None else list(index)
        start, stop, _ = within[split.dim].indices(shape[split.dim])
        within[split.dim] = slice(split.range.start + start, split.range.start + stop)
        return self._whole.read(name, within)


class ShardedStore:
    """A Store of whole tensors over one that holds a tensor-parallel shard of each."""

    def __init__(self, shards: Store, splits: Mapping[str, Split], mesh: Mesh) -> None:
        self._shards = shards
        self._splits = splits
        self._mesh = mesh

    def names(self) -> Sequence[str]:
        return self._shards.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, split = list(self._shards.shape(name)), self._splits.get(name)
        if split is not None:
            shape[split.dim] = sum(split.sizes)
        return tuple(shape)

    def gather(self, name: str, kind: Kind) -> torch.Tensor:
        shard, split = self._shards.gather(name, kind), self._splits.get(name)
        return shard if split is None else _gather(shard.detach(), split, self._mesh)

    def begin_load(self, updates: int) -> None:
        self._shards.begin_load(updates)

    def fill(self, name: str, kind: Kind, reader: TensorReader | None) -> None:
        self._shards.fill(name, kind, None if reader is None else PartReader(reader, self._splits))

    def publish(self) -> None:
        self._shards.publish()


def _gather(shard: torch.Tensor, split: Split, mesh: Mesh) -> torch.Tensor:
    """The whole tensor.  Shards may differ in size by one row, so all are padded to the largest."""
    shard = shard.to(mesh.group.device)
    shape = list(shard.shape)
    shape[split.dim] = max(split.sizes)
    padded = shard.new_zeros(shape)
    padded.narrow(split.dim, 0, shard.shape[split.dim]).copy_(shard)
    parts = [torch.empty_like(padded) for _ in split.sizes]
    distributed.all_gather(parts, padded, group=mesh.tensor_group)
    return torch.cat([part.narrow(split.dim, 0, size) for part, size in zip(parts, split.sizes, strict=True)], split.dim)
