"""Layouts: the ways to lay a run out over backends, processes and devices that parity compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.config.schema import BackendName, Precision

MESH_DEVICES = 8
"""Virtual CPU devices of the meshes that are tried."""


@dataclass(frozen=True)
class Layout:
    """Where and how a run is computed.

    data, fsdp: axes of a JAX mesh.  tensor, context: of any mesh.  zero_stage: of DeepSpeed.  processes: of DeepSpeed, which
    tensor and context divide, or that share the JAX mesh.  micro_batch: sequences per device and forward pass, where they are
    not the run file's.
    """

    backend: BackendName
    precision: Precision
    zero_stage: int = 0
    processes: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    micro_batch: int | None = None

    @property
    def devices(self) -> int:
        """Devices over all processes."""
        return self.data * self.fsdp * self.tensor * self.context if self.backend == "jax" else self.processes

    @property
    def data_parallel(self) -> int:
        """Groups of devices that see different rows."""
        return self.devices // (self.tensor * self.context)

    @property
    def name(self) -> str:
        """How a person calls it."""
        numbers = ", bf16" if self.precision == "bf16" else ""
        if self.backend == "deepspeed":
            # DeepSpeed has no float64: the backend runs the same model and optimiser without its engine.
            engine = "PyTorch" if self.precision == "fp64" else f"DeepSpeed ZeRO {self.zero_stage}"
            engine += "".join(f", {axis} {size}" for axis, size in self._inner.items() if size > 1)
            return f"{engine}, {self.processes} process{'es' if self.processes > 1 else ''}{numbers}"
        axes = {"data": self.data, "fsdp": self.fsdp, **self._inner}
        mesh = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "1 device"
        name = f"JAX, {mesh}" + (f", {self.processes} processes" if self.processes > 1 else "")
        return name + (f", micro-batches of {self.micro_batch}" if self.micro_batch else "") + numbers

    @property
    def _inner(self) -> dict[str, int]:
        """Axes along which devices share rows."""
        return {"tensor": self.tensor, "context": self.context}

    @property
    def slug(self) -> str:
        """The name as part of a folder's."""
        return f"{self.precision}-{self.name}".lower().replace(", ", "-").replace(" ", "-")


def one_device(backend: BackendName, precision: Precision) -> Layout:
    """One process on one device, nothing sharded."""
    return Layout(backend, precision)


def deepspeed_layouts(precision: Precision, stages: Sequence[int], processes: int) -> list[Layout]:
    """DeepSpeed at every stage over so many processes; fp64, which it does not have, without stages."""
    wanted = (0,) if precision == "fp64" else tuple(stages)
    return [Layout("deepspeed", precision, stage, processes) for stage in wanted]


def deepspeed_mesh_layouts(precision: Precision) -> list[Layout]:
    """AutoTP, Ulysses and both, each at a ZeRO stage of its own; fp64 without stages."""
    meshes = ((3, 2, 1), (2, 1, 2), (1, 2, 2))
    return [
        Layout("deepspeed", precision, 0 if precision == "fp64" else stage, tensor * context, tensor=tensor, context=context)
        for stage, tensor, context in meshes
    ]


def mesh_layouts(precision: Precision) -> list[Layout]:
    """The meshes of eight devices."""
    return [
        Layout("jax", precision, data=8),
        Layout("jax", precision, fsdp=8),
        Layout("jax", precision, fsdp=4, tensor=2),
        Layout("jax", precision, data=2, fsdp=2, tensor=2),
        Layout("jax", precision, data=2, context=4),
        Layout("jax", precision, fsdp=2, tensor=2, context=2),
    ]
