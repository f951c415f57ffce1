"""What malloc does with memory that torch gives back, in processes of their own: it holds for all of a process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from jaxllm.torch_backend.host_memory import is_told

BLOCK = 64 * 2**20
# Resident bytes that are left of a block of 64 MiB after it was freed.
LEFT = f"""
import psutil, torch
from jaxllm.torch_backend.host_memory import keep_freed_memory
torch.ones(8)
can = keep_freed_memory()
before = psutil.Process().memory_info().rss
block = torch.ones({BLOCK // 4})
del block
print(can, psutil.Process().memory_info().rss - before)
"""


def left(**environment):
    # What the tests themselves were started with is not what is tested.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", LEFT], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    can, size = done.stdout.split()
    return can == "True", int(size)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_freed_memory_is_kept_unless_someone_said_otherwise():
    can, size = left()
    assert can
    assert size > 0.9 * BLOCK
    told, size = left(MALLOC_TRIM_THRESHOLD_="65536")
    assert not told
    assert size < 0.1 * BLOCK


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=9"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=9"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, True),
        ({"HOME": "/root/glibc.malloc.mmap_"}, False),
    ],
)
def test_who_is_told(environment, told):
    assert is_told(environment) is told
