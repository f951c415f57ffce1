"""What must be said to JAX once per process, before it looks for devices."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax

from jaxllm.config.schema import RunConfig
from jaxllm.jax_backend.compiler_memory import give_back_after_compiling
from jaxllm.jax_backend.distributed import join

COMPILATION_CACHE = Path("~/.cache/jaxllm/xla")

# Device nodes of Google, NVIDIA and AMD accelerators.
_ACCELERATOR_NODES = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def configure_process(config: RunConfig) -> bool:
    """Set float64, the compilation cache and the CPU devices, and join the other processes; whether there are any.

    A compilation cache that the user has set stays.
    """
    give_back_after_compiling()
    if config.training.precision == "fp64":
        jax.config.update("jax_enable_x64", True)
    if _setting("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE.expanduser()))
    try:
        jax.config.update("jax_num_cpu_devices", config.jax.cpu_devices)
    except RuntimeError:
        # JAX has started already, with as many CPU devices as it was told then; the mesh says so when they are too few.
        return join()
    if not _setting("jax_platforms") and find_spec("libtpu") and not _has_accelerator():
        # With libtpu but no TPU, JAX would look for one and print warnings.
        jax.config.update("jax_platforms", "cpu")
    return join()


def _setting(name: str) -> object:
    """A JAX option; they are attributes that type checkers do not know."""
    return getattr(jax.config, name)


def _has_accelerator() -> bool:
    return any(True for pattern in _ACCELERATOR_NODES for _ in Path("/dev").glob(pattern))
