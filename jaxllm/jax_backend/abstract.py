"""A run's training step without devices: lowered and compiled for shapes alone, for a topology that need not be there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jaxllm.config.batch import resolve_batch
from jaxllm.errors import ConfigError
from jaxllm.families.spec import HeadSpec
from jaxllm.jax_backend.assembly import Assembly
from jaxllm.jax_backend.mesh import mesh_of, mesh_sizes
from jaxllm.jax_backend.optimizer import Moments, StepScalars
from jaxllm.jax_backend.sharding import MESH_AXES, Layout, data_parallel
from jaxllm.jax_backend.step import DeviceBatch
from jaxllm.run import Run


def topology_mesh(run: Run, topology: str, slices: int, options: Mapping[str, object]) -> Mesh:
    """The run's mesh on a topology's devices, laid out as on the real ones (`mesh_of`).

    ConfigError when the mesh does not match the number of devices.
    """
    extra = dict(options) | ({"num_slices": slices} if slices > 1 else {})
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    sizes = mesh_sizes(run.config.parallel, len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    if math.prod(shape) != len(devices):
        said = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "data 1"
        raise ConfigError(
            "parallel",
            f"the mesh {said} uses {math.prod(shape)} of the {len(devices)} devices of {slices} x {topology}; "
            "make their product match, or set parallel.data to -1",
        )
    return mesh_of(sizes, devices)


@dataclass(frozen=True)
class Compiled:
    """A compiled step.

    memory: the compiler's own analysis of one device, in bytes.  processor_seconds: of tracing and compiling.
    """

    executable: Any
    trace_seconds: float
    compile_seconds: float
    processor_seconds: float
    memory: Mapping[str, int]
    flops: float | None


def compile_step(parts: Assembly, run: Run, mesh: Mesh) -> Compiled:
    """Compile a step ahead of time; jax.errors.JaxRuntimeError (RESOURCE_EXHAUSTED) when it does not fit."""
    started, processor = time.perf_counter(), time.process_time()
    lowered = parts.train_step.lower(*abstract_arguments(parts, run, mesh))  # type: ignore[attr-defined]
    traced = time.perf_counter()
    executable = lowered.compile()
    finished = time.perf_counter()
    analysis = executable.memory_analysis()
    names = [name for name in dir(analysis) if name.endswith("_in_bytes")]
    cost = executable.cost_analysis() or {}
    return Compiled(
        executable,
        traced - started,
        finished - traced,
        time.process_time() - processor,
        {name.removesuffix("_in_bytes"): int(getattr(analysis, name)) for name in names},
        cost.get("flops"),
    )


def abstract_arguments(parts: Assembly, run: Run, mesh: Mesh) -> tuple[Any, ...]:
    """What a training step is called with, as shapes."""
    policy, layout = parts.network.runtime.policy, Layout(mesh)
    shapes, storage = parts.network.shapes, parts.storage
    params, exp_avg, exp_avg_sq = (
        {path: jax.ShapeDtypeStruct(leaf.shape, policy.master, sharding=where[path]) for path, leaf in shapes.items()}
        for where in (storage.params, storage.moments, storage.moments)
    )
    plan = resolve_batch(run.config, data_parallel(mesh))
    shape = (plan.accumulation, plan.micro_batch * data_parallel(mesh), run.config.data.sequence_length)
    rows = layout.sharding(None, "batch", "sequence")

    def place(dtype: Any, shape: tuple[int, ...] = (), sharding: NamedSharding = layout.whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tokens = place(jnp.int32, shape, rows)
    batch: Any = DeviceBatch(tokens, *_targets(run.model.spec.head, place, shape, rows), tokens, tokens)  # type: ignore[arg-type]
    scalars = StepScalars(*(place(policy.master) for _ in StepScalars._fields))
    return params, Moments(exp_avg, exp_avg_sq), batch, scalars, place(jnp.uint32)


def _targets(head: HeadSpec, place: Callable[..., Any], shape: tuple[int, ...], rows: NamedSharding) -> tuple[Any, Any]:
    """Targets and their weights: of every token, or of every row."""
    if head.kind != "sequence-classification":
        return place(jnp.int32, shape, rows), place(jnp.float32, shape, rows)
    is_label = head.loss == "cross-entropy"
    of_row = (*shape[:2], 1 if is_label else head.outputs)
    return place(jnp.int32 if is_label else jnp.float32, of_row), place(jnp.float32, of_row)
