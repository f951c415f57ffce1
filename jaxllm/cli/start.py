"""Where `jaxllm` starts: the process gets the memory pages that training wants, then the verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from jaxllm.cli.main import main

COMPUTING_VERBS = frozenset({"train", "bench", "eval"})
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start() -> None:
    """The command line.  May begin again in the same process (`exec`), with `huge_page_environment`."""
    environment = huge_page_environment(sys.argv[1:], os.environ)
    if environment is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - no shell is wanted
    main()


def huge_page_environment(
    arguments: list[str], environment: Mapping[str, str], kernel_setting: Path = _KERNEL_SETTING
) -> dict[str, str] | None:
    """The environment in which malloc asks for huge pages; None where it does already, cannot, or need not.

    XLA takes the temporaries of a step on a CPU from malloc, hundreds of MiB at a time, and gives them back after it: in pages
    of 4 KiB every step spends a sixth of its time in page faults (benchmarks/LOG.md).  glibc reads the setting when a process
    starts.
    """
    if (
        not set(arguments[:1]) & COMPUTING_VERBS
        or _HUGE_PAGES in environment.get(_TUNABLES, "")
        or not _can_ask(kernel_setting)
    ):
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
