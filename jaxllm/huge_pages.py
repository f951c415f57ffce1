"""Memory from malloc in huge pages: for processes that take hundreds of MiB at a time and give them back.

XLA takes the temporaries of a step on a CPU that way: in pages of 4 KiB every step spends a sixth of its time in page faults
(benchmarks/LOG.md).  The compiler for TPUs keeps its code in many small pieces of memory.  glibc reads the setting when a
process starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages(environment: Mapping[str, str], kernel_setting: Path = KERNEL_SETTING) -> dict[str, str] | None:
    """The environment of a process whose malloc asks for huge pages; None where it says so already, either way, or cannot."""
    if _HUGE_PAGES in environment.get(_TUNABLES, "") or not _can_ask(kernel_setting):
        return None
    tunables = [environment[_TUNABLES]] if environment.get(_TUNABLES) else []
    return {**environment, _TUNABLES: ":".join([*tunables, f"{_HUGE_PAGES}=1"])}


def _can_ask(kernel_setting: Path) -> bool:
    """Whether this glibc knows the setting (2.35 does), and the kernel gives huge pages to who asks and to nobody else."""
    try:
        library = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return (
            library[:1] == ["glibc"]
            and tuple(map(int, library[1].split(".")[:2])) >= (2, 35)
            and "[madvise]" in kernel_setting.read_text()
        )
    except (OSError, ValueError, AttributeError, IndexError):
        return False
