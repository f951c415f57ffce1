"""How a process that trains on a CPU gets its memory from malloc, and when it gives it back.

torch takes its tensors from malloc, which maps each large one anew and unmaps it when it is freed: the kernel fills the same
hundreds of MiB with zeros in every step, page by page.  At ZeRO stage 0 those are activations, and keeping them is faster at no
price.  From stage 1 on they are flat buffers of DeepSpeed too.  Those of a large model, kept, leave holes of a gigabyte, and as
huge pages, which `jaxllm train` asks for because of JAX, they cost more to fill than in small ones (benchmarks/LOG.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache

from jaxllm.c_library import c_function
from jaxllm.families import Model
from jaxllm.torch_backend.bucket import LARGEST_BUCKET, process_elements

# Of mallopt(3) and prctl(2).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_PR_SET_THP_DISABLE = 41
_NEVER = -1
_SETTINGS = ("MALLOC_MMAP_", "MALLOC_TRIM_", "glibc.malloc.mmap_", "glibc.malloc.trim_")
"""How who starts the process tells malloc when to give memory back."""


def suit_memory(model: Model, zero_stage: int, tensor: int) -> None:
    """From now on, in all of this process, memory as a run on a CPU needs it.  tensor: processes of an AutoTP group."""
    if zero_stage == 0 or process_elements(model, tensor) <= LARGEST_BUCKET["cpu"]:
        keep_freed_memory()
    else:
        refuse_huge_pages()


def is_told(environment: Mapping[str, str]) -> bool:
    """Whether an environment says already when malloc gives memory back."""
    said = (*environment, environment.get("GLIBC_TUNABLES", ""))
    return any(setting in words for words in said for setting in _SETTINGS)


@cache
def keep_freed_memory() -> bool:
    """Malloc maps and trims nothing from now on; whether this C library can (glibc), and nobody has told it otherwise."""
    if is_told(os.environ):
        return False
    mallopt = c_function("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


@cache
def refuse_huge_pages() -> bool:
    """The process and its children get small pages from now on; whether this kernel can (Linux)."""
    prctl = c_function("prctl")
    return prctl is not None and prctl(_PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
