"""The device mesh of a run: sizes from `parallel`, devices from JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from numpy.typing import NDArray

from jaxllm.config.remat import kept_points
from jaxllm.config.schema import ParallelConfig, RunConfig
from jaxllm.errors import ConfigError
from jaxllm.jax_backend.combinations import check_combinations
from jaxllm.jax_backend.cuts import MESH_AXES
from jaxllm.jax_backend.offload import check_host_memory
from jaxllm.run import Run


def run_devices(config: RunConfig) -> list[jax.Device]:
    """The devices of a run: every accelerator, or `jax.cpu_devices` virtual CPU devices of each process."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return devices
    wanted = config.jax.cpu_devices
    chosen = [
        device for process in range(jax.process_count()) for device in _of_process(devices, process)[:wanted]
    ]  # fmt: skip
    if len(chosen) < wanted * jax.process_count():
        raise ConfigError(
            "jax.cpu_devices",
            f"JAX already runs with {len(devices) // jax.process_count()} CPU devices in this process, so there cannot be "
            f"{wanted}; start a new process",
        )
    return chosen


def _of_process(devices: list[jax.Device], process: int) -> list[jax.Device]:
    return [device for device in devices if device.process_index == process]


def mesh_sizes(parallel: ParallelConfig, devices: int) -> dict[str, int]:
    """Size of every mesh axis, `data: -1` resolved.  ConfigError when their product is more than the devices."""
    sizes = {axis: int(getattr(parallel, axis)) for axis in MESH_AXES}
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    if sizes["data"] == -1:
        if devices % others:
            raise ConfigError(
                "parallel", f"{_product(sizes)} does not divide the {_count(devices)}; make it a divisor of {devices}"
            )
        sizes["data"] = devices // others
    needed = others * sizes["data"]
    if needed > devices:
        hint = "use fewer, or jax.cpu_devices to split the CPU" if jax.default_backend() == "cpu" else "use fewer"
        raise ConfigError("parallel", f"the mesh {_product(sizes)} needs {needed} devices but there are {devices}; {hint}")
    return sizes


def _product(sizes: dict[str, int]) -> str:
    """`fsdp 4 x tensor 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)) or "data 1"


def _count(devices: int) -> str:
    return f"{devices} device{'s' if devices != 1 else ''}"


def check_mesh(run: Run, mesh: Mesh) -> None:
    """ConfigError when a mesh cannot do what the run asks of it (`check_combinations`), or its devices cannot."""
    check_combinations(run.config, run.model)
    kept = kept_points(run.config.jax.remat)
    if kept and kept.host:
        check_host_memory(mesh, "jax.remat")
    if run.config.jax.offload_optimizer != "none":
        check_host_memory(mesh, "jax.offload_optimizer")


def create_mesh(config: RunConfig) -> Mesh:
    """The mesh of a run.  Its axes are Auto: the compiler propagates shardings from parameters, batch and constraints.

    A mesh smaller than the machine takes its first devices; ConfigError when that would leave a process of several without any.
    """
    devices = run_devices(config)
    sizes = mesh_sizes(config.parallel, len(devices))
    needed = math.prod(sizes.values())
    if needed < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            "parallel",
            f"the mesh {_product(sizes)} uses {needed} of the {_count(len(devices))} of {jax.process_count()} processes; "
            "set parallel.data to -1 to use them all",
        )
    return mesh_of(sizes, devices[:needed])


def single_device_mesh() -> Mesh:
    """The first device of this process by itself."""
    return mesh_of(dict.fromkeys(MESH_AXES, 1), jax.local_devices()[:1])


def mesh_of(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of those sizes on the first of `devices` (of all), `placed` there."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    devices = list(devices or jax.devices())[: math.prod(shape)]
    return Mesh(placed(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def placed(shape: Sequence[int], devices: Sequence[jax.Device]) -> NDArray[np.object_]:
    """The devices in that shape, so that neighbours along an axis have links to each other.

    Several TPU slices are cut along the outermost axes: within a slice talk the slice's own links, and only between slices the
    data-centre network.
    """
    slices = _slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across, within = over_slices(shape, slices)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def _slices(devices: Sequence[jax.Device]) -> int:
    """TPU slices among the devices; 1 on everything else, where JAX's slices are no matter of links."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def over_slices(shape: Sequence[int], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many slices each axis of a mesh spans, outermost axes first, and its size within a slice."""
    across, left = [], slices
    for size in shape:
        ways = math.gcd(size, left)
        across.append(ways)
        left //= ways
    return tuple(across), tuple(size // ways for size, ways in zip(shape, across, strict=True))
