"""TrainingState into and out of a running engine, bit for bit, at every ZeRO stage.

A Store is where the fp32 masters and the two moments live: in whole tensors (stage 0 and plain torch), in fragments of flat
buffers (stages 1 and 2), or in padded partitions (stage 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.nn import Parameter

from jaxllm.state.training_state import Array, Progress, TensorReader, TrainingState
from jaxllm.torch_backend.masters import MasterWeights

Kind = Literal["params", "exp_avg", "exp_avg_sq"]
_MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


class Store(Protocol):
    """Masters and moments of one engine, by Hugging Face name."""

    def names(self) -> Sequence[str]:
        """In checkpoint order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def gather(self, name: str, kind: Kind) -> torch.Tensor:
        """The whole tensor (collective)."""
        ...

    def begin_load(self, updates: int) -> None:
        """Make the optimiser's state exist, with its step count."""
        ...

    def fill(self, name: str, kind: Kind, reader: TensorReader | None) -> None:
        """Overwrite this process's part of a tensor from `reader`, or with zeros."""
        ...

    def publish(self) -> None:
        """Bring the masters into the parameters that compute (collective)."""
        ...


@torch.no_grad()
def load_state(store: Store, state: TrainingState) -> None:
    """Overwrite masters, moments and step count (collective)."""
    store.begin_load(state.progress.updates)
    for kind in _MOMENTS:
        for name in store.names():
            store.fill(name, kind, getattr(state, kind))
    load_params(store, state.params)


@torch.no_grad()
def load_params(store: Store, params: TensorReader) -> None:
    """Overwrite the masters alone (collective)."""
    for name in store.names():
        store.fill(name, "params", params)
    store.publish()


def export_state(store: Store, progress: Progress) -> TrainingState:
    """The engine's state, each tensor gathered when it is read (collective); moments are None before the first update."""
    params, exp_avg, exp_avg_sq = (GatheredTensors(store, kind) for kind in ("params", *_MOMENTS))
    return TrainingState(progress, params, exp_avg, exp_avg_sq) if progress.updates else TrainingState(progress, params)


class GatheredTensors:
    """One kind of tensor of a store, as a collective TensorReader."""

    def __init__(self, store: Store, kind: Kind) -> None:
        self._store = store
        self._kind = kind

    def names(self) -> Sequence[str]:
        return self._store.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._store.shape(name)

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        whole = self._store.gather(name, self._kind)
        # Cut on the device, copied to the host once, and never a view of a live parameter.
        part = whole[tuple(index)] if index else whole
        values: Array = part.detach().to("cpu", copy=True).numpy()
        return values


def read_flat(reader: TensorReader, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) in C order of a tensor, reading only the rows they are in."""
    shape = reader.shape(name)
    row = math.prod(shape[1:])
    first, last = start // row, -(-stop // row)
    values = reader.read(name, [slice(first, last), *(slice(0, size) for size in shape[1:])])
    return torch.from_numpy(values.reshape(-1)[start - first * row : stop - first * row])


def _step_count(updates: int) -> torch.Tensor:
    """What torch's AdamW keeps as `step`, on the host; in float64, since float32 stops counting at 2**24."""
    return torch.tensor(float(updates), dtype=torch.float64)


class ReplicatedStore:
    """Whole tensors on every process: plain torch, and ZeRO stage 0."""

    def __init__(
        self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, masters: MasterWeights | None = None
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = optimizer
        self._masters = masters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def gather(self, name: str, kind: Kind) -> torch.Tensor:
        parameter = self._parameters[name]
        values: torch.Tensor = parameter.detach() if kind == "params" else self._optimizer.state[parameter][kind]
        return values

    def begin_load(self, updates: int) -> None:
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                "step": _step_count(updates),
                **{kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in _MOMENTS},
            }

    def fill(self, name: str, kind: Kind, reader: TensorReader | None) -> None:
        target = self.gather(name, kind)
        if reader is None:
            target.zero_()
        else:
            target.copy_(torch.from_numpy(np.require(reader.read(name), requirements="W")))  # torch warns of read-only arrays

    def publish(self) -> None:
        if self._masters is not None:
            self._masters.publish()


class FragmentStore:
    """Flat fp32 buffers cut over the processes without regard to tensors: ZeRO stages 1 and 2."""

    def __init__(self, parameters: Mapping[str, Parameter], zero: Any, flat: Sequence[torch.Tensor]) -> None:
        self._parameters = dict(parameters)
        self._zero = zero
        self._flat = flat

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def gather(self, name: str, kind: Kind) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        whole: torch.Tensor = (
            safe_get_full_fp32_param(parameter) if kind == "params" else safe_get_full_optimizer_state(parameter, kind)
        )
        return whole

    def begin_load(self, updates: int) -> None:
        state = self._zero.optimizer.state
        for buffer in self._flat:
            if buffer not in state or not state[buffer]:
                state[buffer] = {kind: torch.zeros_like(buffer) for kind in _MOMENTS}
            state[buffer]["step"] = _step_count(updates)
        # Links every parameter to its piece of the moments, which DeepSpeed does only after the first step.
        self._zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 - there is no public name for it

    def fill(self, name: str, kind: Kind, reader: TensorReader | None) -> None:
        fragment = self._parameters[name]._hp_mapping  # type: ignore[attr-defined]  # noqa: SLF001
        if fragment is None:  # no element of this tensor belongs to this process
            return
        target = fragment.get_hp_fragment(None if kind == "params" else kind)
        if reader is None:
            target.zero_()
            return
        address = fragment.lp_fragment_address
        target.copy_(read_flat(reader, name, address.start, address.start + address.numel))

    def publish(self) -> None:
        self._zero.update_lp_params()


class PartitionStore:
    """Every tensor cut into equal padded parts, one a process: ZeRO stage 3."""

    def __init__(self, parameters: Mapping[str, Parameter], zero: Any, rank: int) -> None:
        self._parameters: dict[str, Any] = dict(parameters)
        self._zero = zero
        self._rank = rank

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].ds_shape)

    def gather(self, name: str, kind: Kind) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        whole: torch.Tensor = (
            safe_get_full_fp32_param(parameter) if kind == "params" else safe_get_full_optimizer_state(parameter, kind)
        )
        return whole

    def begin_load(self, updates: int) -> None:
        state = self._zero.optimizer.state
        for buffer in self._zero.fp32_partitioned_groups_flat:
            if buffer not in state or not state[buffer]:
                state[buffer] = {kind: torch.zeros_like(buffer) for kind in _MOMENTS}
            state[buffer]["step"] = _step_count(updates)

    def _part(self, name: str, reader: TensorReader | None) -> torch.Tensor:
        """This process's elements, with zeros where DeepSpeed pads."""
        parameter = self._parameters[name]
        size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
        part = torch.zeros(size)
        start, stop = min(self._rank * size, whole), min((self._rank + 1) * size, whole)
        if reader is not None and start < stop:
            part[: stop - start] = read_flat(reader, name, start, stop)
        return part

    def fill(self, name: str, kind: Kind, reader: TensorReader | None) -> None:
        # The "full" setters fail where the size is not a multiple of the number of processes; the local ones take a part.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter, part = self._parameters[name], self._part(name, reader)
        if kind == "params":
            safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.data.copy_(part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def publish(self) -> None:
        # Small parameters are kept whole on every process and must be gathered anew from the parts just written.
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
