"""Settings of the whole test session.

JAX sees eight virtual CPU devices, so that any mesh can be tried (a test of one device uses the first), and has float64
switched on, so that code which forgets to name a dtype is found out.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs of the session stay out of the user's own cache."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
