"""Settings of the whole test session.

JAX sees eight virtual CPU devices, so that any mesh can be tried (a test of one device uses the first), and has float64
switched on, so that code which forgets to name a dtype is found out.  Tests compare numbers and compile much more than they
compute: in this process LLVM does not optimise, and XLA writes loops by its older emitters, which take a quarter of the time.
Processes that tests start are as a user's are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
has_older_emitters = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12)
emitters = "--xla_cpu_use_fusion_emitters=false" if has_older_emitters else ""
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {emitters}"
jax.devices()  # starts JAX, so that no test's run file changes the number of devices of the others
del os.environ["XLA_FLAGS"]


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs compiled twice in a session come from a cache, which is not the user's own."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
