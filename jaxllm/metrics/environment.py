"""environment.json: what a run ran on, so that its numbers can be understood and repeated later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from jaxllm import __version__

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "torch", "deepspeed", "transformers", "tokenizers",
    "datasets", "grain", "safetensors", "huggingface_hub", "numpy", "scipy", "einops", "ml_dtypes", "pydantic",
)  # fmt: skip
"""Packages that can change a run's numbers or its speed."""


def describe_environment(device_description: Mapping[str, object], command: Sequence[str] | None = None) -> dict[str, Any]:
    """The contents of environment.json.

    device_description: what the backend says of its devices.  command: the command line; default: this process's.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv if command is None else command),
        "working_directory": str(Path.cwd()),
        "git": git_state(Path.cwd()),
        "jaxllm": __version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": describe_machine(),
        "device": dict(device_description),
    }


def describe_machine() -> dict[str, Any]:
    """Operating system, processor and memory of this machine."""
    return {
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": cpu_model(),
        "cpus": _usable_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed, read without importing them."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that `folder` is in, and whether tracked files differ from it; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def write_environment(path: Path, environment: Mapping[str, Any]) -> None:
    """Write environment.json; what an earlier start of the same run wrote moves, oldest first, to its list `earlier`."""
    earlier: list[dict[str, Any]] = []
    if path.exists():
        try:
            before = json.loads(path.read_text())
            earlier = [*before.pop("earlier", []), before]
        except (json.JSONDecodeError, AttributeError):
            earlier = []  # cut off by a crash while it was written: not worth failing a run for
    whole = {**environment, "earlier": earlier} if earlier else dict(environment)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(whole, indent=2, default=str) + "\n")
    temporary.replace(path)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
