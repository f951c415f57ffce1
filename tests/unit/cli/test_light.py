"""No verb loads a framework it does not use.  Each is asked in a process of its own what it has imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "deepspeed", "transformers", "datasets", "grain"}

PROGRAM = """
import json, sys
sys.argv = ["jaxllm", *sys.argv[1:]]
try:
    from jaxllm.cli.main import main
    if sys.argv[1:]:
        main()
except SystemExit as stop:
    status = stop.code
else:
    status = 0
print("\\n" + json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that a command line leaves imported, after it succeeded."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status in (0, None), done.stderr
    return set(modules)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",)])
def test_the_list_of_verbs_imports_next_to_nothing(arguments: tuple[str, ...]) -> None:
    modules = imported_by(*arguments)
    assert not modules & (FRAMEWORKS | {"pydantic", "numpy", "yaml", "rich", "asyncio"})
    assert "jaxllm" in modules


@pytest.mark.parametrize("verb", ["train", "generate", "export", "plan", "data", "config", "doctor"])
def test_the_help_of_a_verb_imports_no_framework(verb: str) -> None:
    assert not imported_by(verb, "--help") & (FRAMEWORKS | {"pydantic"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "check", "configs/quickstart.yaml"),
        ("config", "show", "configs/gpt2-124m.yaml"),
        ("config", "schema"),
        ("plan", "configs/gpt2-124m.yaml", "--chips", "h100x8"),
    ],
)
def test_config_imports_no_framework(arguments: tuple[str, ...]) -> None:
    modules = imported_by(*arguments)
    assert not modules & FRAMEWORKS
    assert "pydantic" in modules


def test_doctor_asks_the_frameworks_elsewhere() -> None:
    assert not imported_by("doctor") & FRAMEWORKS
