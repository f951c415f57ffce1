"""Where `jaxllm` starts: the process gets the memory pages that training wants, then the verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from jaxllm.cli.main import main
from jaxllm.huge_pages import KERNEL_SETTING, with_huge_pages

COMPUTING_VERBS = frozenset({"train", "bench", "eval"})


def start() -> None:
    """The command line.  May begin again in the same process (`exec`), with `huge_page_environment`."""
    environment = huge_page_environment(sys.argv[1:], os.environ)
    if environment is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - no shell is wanted
    main()


def huge_page_environment(
    arguments: list[str], environment: Mapping[str, str], kernel_setting: Path = KERNEL_SETTING
) -> dict[str, str] | None:
    """The environment in which malloc asks for huge pages; None where it does already, cannot, or need not."""
    return with_huge_pages(environment, kernel_setting) if set(arguments[:1]) & COMPUTING_VERBS else None
