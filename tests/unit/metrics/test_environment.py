from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import psutil
import pytest

import jaxllm
from jaxllm.metrics.environment import describe_environment, git_state, package_versions, write_environment


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_environment_says_what_a_run_ran_on() -> None:
    environment = json.loads(json.dumps(describe_environment({"chip": "cpu", "devices": 8}, ["jaxllm", "train", "run.yaml"])))
    assert environment["jaxllm"] == jaxllm.__version__
    assert environment["python"] == sys.version.split()[0]
    assert environment["command"] == ["jaxllm", "train", "run.yaml"]
    assert environment["device"] == {"chip": "cpu", "devices": 8}
    assert environment["packages"]["numpy"] == metadata.version("numpy")
    assert environment["machine"]["cpus"] == len(psutil.Process().cpu_affinity())
    assert environment["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert environment["machine"]["cpu"]
    assert datetime.fromisoformat(environment["started"]).utcoffset().total_seconds() == 0


def test_versions_are_read_without_importing_anything() -> None:
    script = (
        "import sys; from jaxllm.metrics.environment import describe_environment; describe_environment({}); "
        "print([name for name in ('jax', 'torch', 'deepspeed', 'transformers', 'datasets') if name in sys.modules])"
    )
    root = Path(jaxllm.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert package_versions(["numpy", "no-such-package-anywhere"]) == {"numpy": metadata.version("numpy")}


def test_git_state_follows_the_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").write_text("data beside the code")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_git_state_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(jaxllm.__file__).parent) is None


def test_a_resumed_run_keeps_what_it_ran_on_before(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    for backend in ("jax", "deepspeed", "jax"):
        write_environment(path, {"backend": backend})
    assert json.loads(path.read_text()) == {"backend": "jax", "earlier": [{"backend": "jax"}, {"backend": "deepspeed"}]}
    path.write_text('{"backend": "j')
    write_environment(path, {"backend": "jax"})
    assert json.loads(path.read_text()) == {"backend": "jax"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["environment.json"]
