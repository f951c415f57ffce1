"""Huge pages: who asks for them, and that a process which begins again does what it was told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.cli.start import huge_page_environment
from jaxllm.huge_pages import with_huge_pages
from jaxllm.planning.tpu import compiler


@pytest.fixture
def on_request(tmp_path: Path) -> Path:
    """A kernel that gives huge pages to who asks."""
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    return setting


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is of glibc")
def test_a_verb_that_computes_asks_once_and_keeps_other_settings(on_request: Path) -> None:
    first = huge_page_environment(["train", "run.yaml"], {"GLIBC_TUNABLES": "glibc.malloc.check=1", "A": "b"}, on_request)
    assert first == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1", "A": "b"}
    assert huge_page_environment(["train", "run.yaml"], first, on_request) is None


@pytest.mark.parametrize("arguments", [[], ["--help"], ["config", "check", "train"]])
def test_other_verbs_do_not(arguments: list[str], on_request: Path) -> None:
    assert huge_page_environment(arguments, {}, on_request) is None


@pytest.mark.parametrize("setting", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_nor_where_the_kernel_always_or_never_gives_them(setting: str | None, tmp_path: Path) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    assert huge_page_environment(["train"], {}, path) is None


def test_the_user_has_the_last_word(on_request: Path) -> None:
    assert huge_page_environment(["train"], {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, on_request) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is of glibc")
def test_the_compiler_for_tpus_asks_whatever_the_verb(
    on_request: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(compiler, "with_huge_pages", lambda environment: with_huge_pages(environment, on_request))
    assert compiler.worker_environment(tmp_path, [])["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert compiler.worker_environment(tmp_path, [])["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


def test_a_process_that_began_again_does_what_it_was_told() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "jaxllm", "train", "no such file.yaml"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "no such file.yaml: there is no such run file\n")
