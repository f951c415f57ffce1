"""What one training step on a CPU gives back is kept for the next one.

torch takes its tensors from malloc, which maps each large one anew and unmaps it when it is freed: the kernel fills the same
hundreds of MiB with zeros in every step, page by page (benchmarks/LOG.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1
_SETTINGS = ("MALLOC_MMAP_", "MALLOC_TRIM_", "glibc.malloc.mmap_", "glibc.malloc.trim_")
"""How who starts the process tells malloc when to give memory back."""


def is_told(environment: Mapping[str, str]) -> bool:
    """Whether an environment says already when malloc gives memory back."""
    said = (*environment, environment.get("GLIBC_TUNABLES", ""))
    return any(setting in words for words in said for setting in _SETTINGS)


@cache
def keep_freed_memory() -> bool:
    """From now on, in all of this process; whether this C library can (glibc), and nobody has told it otherwise."""
    if is_told(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
