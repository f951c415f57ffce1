"""AutoTP: DeepSpeed's tensor parallelism for transformers models, and where each process's shard of a tensor lies.

Queries, keys, values, gate, up and the output head are split by rows of their weight, the two projections back to the residual
by columns, as the model's own `tp_plan` says; of fused projections each part is split by itself.  Embeddings, norms, a head
that is tied to the embedding, and attention whose norms are over all heads stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import distributed

from jaxllm.errors import BackendError
from jaxllm.state.training_state import Array, TensorReader
from jaxllm.torch_backend.mesh import Mesh
from jaxllm.torch_backend.transfer import Kind, Store


@dataclass(frozen=True)
class Split:
    """How one tensor is cut along `dim`.

    widths: of the parts that lie one after another in it (one, or several in a fused projection), each of which is cut by
    itself: the width of every process of a tensor group.  index: this process's.
    """

    dim: int
    widths: tuple[tuple[int, ...], ...]
    index: int

    @property
    def whole(self) -> int:
        """Size of the whole dimension."""
        return sum(map(sum, self.widths))

    def size(self, index: int) -> int:
        """Size of a process's shard."""
        return sum(part[index] for part in self.widths)

    @property
    def ranges(self) -> Iterator[tuple[int, int]]:
        """What this process has of each part: where that starts in the whole dimension, and how wide it is."""
        start = 0
        for part in self.widths:
            yield start + sum(part[: self.index]), part[self.index]
            start += sum(part)


def _query_key_value(config: Any) -> Any:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head_dim
    return (config.num_attention_heads * head_dim, keys, keys), -1


_FUSED: dict[str, Callable[[Any], Any]] = {"qkv_proj": _query_key_value, "gate_up_proj": lambda _: (2, -1)}
"""Of projections that make several things at once: the sizes of these, as AutoTP wants to be told."""


class _HeadsOfShard:
    """A transformers config in which an attention module reads how many heads it has on this process."""

    def __init__(self, whole: Any, processes: int) -> None:
        self._whole = whole
        self._processes = processes

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._whole, name)
        return value // self._processes if name == "num_attention_heads" else value


def split_model(model: Any, mesh: Mesh) -> dict[str, Split]:
    """Replace the layers of a transformers.PreTrainedModel by ones that hold this process's shard; the cuts, by name.

    BackendError when transformers has no plan for the model, or one that AutoTP does not know.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig
    from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info, set_autotp_mode

    set_autotp_mode(training=True)
    autotp = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(torch.nn.Linear, torch.nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig(tp_size=mesh.tensor, layer_specs=_layer_specs(model)),
        model_config=model.config,
        training_mode=True,
    )
    autotp.set_tensor_parallel_config(mesh.tensor, mesh.tensor_group)
    autotp.update_linear_policies()
    autotp._replace_module(model)  # noqa: SLF001 - what the engine calls; jaxllm does so earlier, to know the parameters
    for module in model.modules():
        if hasattr(module, "qkv_proj"):  # it takes queries and keys apart by the number of heads in the config
            module.config = _HeadsOfShard(module.config, mesh.tensor)
    with redirect_stdout(StringIO()):  # it says how many, for every model
        autotp.register_replicated_grad_hooks(model)
    collect_autotp_universal_checkpoint_info(model)  # completes the layouts
    model.ds_autotp_parsed = True  # the engine leaves the model as it is
    return {name: split for name, p in model.named_parameters() if (split := _split_of(p, mesh)) is not None}


def _layer_specs(model: Any) -> list[Any]:
    """DeepSpeed's TPLayerSpecs for a model: of its own plan, and of what that plan leaves to be gathered.

    A plan that gathers the outputs of projections to take them apart has a style that AutoTP lacks (`rowwise_split_input`).
    Fused projections need no gathering where each of their parts is cut by itself.  A part of a layer that does more with
    gathered outputs (a norm over all heads) stays whole.
    """
    from deepspeed.module_inject.autotp_config import PartitionType, TPLayerSpec
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan

    plan = dict(_get_hf_tp_plan(model) or {})
    if not plan:
        raise BackendError(f"parallel.tensor: transformers has no tensor-parallel plan for {type(model).__name__}")
    specs = []
    for part in {pattern.rpartition(".")[0] for pattern, style in plan.items() if style == "rowwise_split_input"}:
        styles = {pattern: plan.pop(pattern) for pattern in [*plan] if pattern.rpartition(".")[0] == part}
        names = {pattern: pattern.rpartition(".")[2] for pattern in styles}
        if not _FUSED.keys() & {*names.values()}:
            continue
        for pattern, style in styles.items():
            shape = _FUSED[names[pattern]](model.config) if names[pattern] in _FUSED else None
            kind = PartitionType.ROW if style == "rowwise_split_input" else PartitionType.COLUMN
            regex = TPPlanConverter._wildcard_to_regex(pattern) + r"\.weight$"  # noqa: SLF001 - as `convert` writes them
            specs.append(TPLayerSpec(patterns=[regex], partition_type=kind, shape=shape))
    try:
        return specs + (TPPlanConverter.convert(plan) or [])
    except ValueError as error:
        raise BackendError(f"parallel.tensor: AutoTP cannot split {type(model).__name__}: {error}") from error


def _split_of(parameter: torch.nn.Parameter, mesh: Mesh) -> Split | None:
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    layout = getattr(parameter, DS_AUTOTP_UC_META, None)
    if layout is None or layout["partition_dim"] is None:
        return None
    widths = layout["sub_param_shard_widths"] or (layout["partition_sizes"],)
    return Split(layout["partition_dim"], tuple(tuple(part) for part in widths), mesh.tensor_index)


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
            shape[split.dim] = split.size(split.index)
        return tuple(shape)

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        split = self._splits.get(name)
        if split is None:
            return self._whole.read(name, index)
        shape = self.shape(name)
        within = [slice(0, size) for size in shape] if index is None else list(index)
        start, stop, _ = within[split.dim].indices(shape[split.dim])
        pieces, offset = [], 0
        for first, width in split.ranges:
            low, high = max(start - offset, 0), min(stop - offset, width)
            if low < high:
                within[split.dim] = slice(first + low, first + high)
                pieces.append(self._whole.read(name, within))
            offset += width
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, split.dim)


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
            shape[split.dim] = split.whole
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
    sizes = [split.size(index) for index in range(mesh.tensor)]
    shape = list(shard.shape)
    shape[split.dim] = max(sizes)
    padded = shard.new_zeros(shape)
    padded.narrow(split.dim, 0, shard.shape[split.dim]).copy_(shard)
    shards = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(shards, padded, group=mesh.tensor_group)
    pieces, offsets = [], [0] * mesh.tensor
    for part in split.widths:
        for index, width in enumerate(part):
            pieces.append(shards[index].narrow(split.dim, offsets[index], width))
            offsets[index] += width
    return torch.cat(pieces, split.dim)
