"""What malloc does with memory that torch gives back, in processes of their own: it holds for all of a process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial

import pytest

from jaxllm.config.schema import ModelConfig
from jaxllm.families import resolve_model
from jaxllm.torch_backend import host_memory
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


# Resident bytes of a block of 64 MiB of which one byte of each MiB is written: with huge pages refused, or not.
TOUCHED = f"""
import mmap, psutil
from jaxllm.torch_backend.host_memory import refuse_huge_pages
refuse_huge_pages() if %d else None
block = mmap.mmap(-1, {BLOCK}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.madvise(mmap.MADV_HUGEPAGE)
before = psutil.Process().memory_info().rss
for start in range(0, {BLOCK}, 2**20):
    block[start] = 1
print(psutil.Process().memory_info().rss - before)
"""


def output(script, **environment):
    # What the tests themselves were started with is not what is tested.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def left(**environment):
    can, size = output(LEFT, **environment)
    return can == "True", int(size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages on request are Linux's")
def test_refused_huge_pages_are_not_given():
    (asked,), (refused,) = output(TOUCHED % 0), output(TOUCHED % 1)
    if int(asked) < BLOCK // 2:
        pytest.skip("this kernel gives no huge pages on request")
    assert int(refused) < BLOCK // 8


@pytest.mark.parametrize(
    ("layers", "stage", "done"),
    [
        (12, 0, "keep_freed_memory"),
        (12, 1, "refuse_huge_pages"),
        (12, 3, "refuse_huge_pages"),
        (1, 3, "keep_freed_memory"),  # 10 million parameters: less than a bucket
    ],
)
def test_what_a_run_gets(layers, stage, done, monkeypatch):
    found = []
    for name in ("keep_freed_memory", "refuse_huge_pages"):
        monkeypatch.setattr(host_memory, name, partial(found.append, name))
    model = resolve_model(ModelConfig.model_validate({"family": "gpt2", "n_layer": layers, "vocab_size": 4000}))
    host_memory.suit_memory(model, stage, 1)
    assert found == [done]


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
