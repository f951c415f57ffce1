"""A virtual environment for every contender, built from the package index once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


class UnavailableError(Exception):
    """A contender that cannot be installed or run, and why."""


@dataclass(frozen=True)
class Environment:
    """requirements: what pip installs.  only: the packages that constraints.txt holds to a version; default: all it knows."""

    name: str
    requirements: tuple[str, ...]
    only: tuple[str, ...] | None = None


HERE = Environment("this", ())
"""The environment that the driver runs in."""


def python_of(environment: Environment, cache: Path) -> Path:
    """The interpreter of an environment, which is built first if it is not there.  UnavailableError when that fails."""
    if environment == HERE:
        return Path(sys.executable)
    constraints = _constraints(environment)
    said = f"{sys.version_info[:2]} {environment.requirements} {constraints}"
    folder = cache / f"{environment.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        print(f"building {folder} ({' '.join(environment.requirements)})", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        (folder / "constraints.txt").write_text(constraints)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--constraint", str(folder / "constraints.txt"), *environment.requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"pip install failed: {last_line(done.stderr)}")
        complete.touch()
    return python


def _constraints(environment: Environment) -> str:
    """The lines of constraints.txt that an environment keeps to."""
    lines = CONSTRAINTS.read_text().splitlines()
    if environment.only is None:
        return "\n".join(lines) + "\n"
    return "\n".join(line for line in lines if re.split(r"[=<> ]", line, maxsplit=1)[0] in environment.only) + "\n"


def last_line(text: str) -> str:
    """The last line that says something, of what a process wrote before it failed; an error's own line if there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|ERROR:", line)]
    return (errors or lines or ["it said nothing"])[-1][:400]
