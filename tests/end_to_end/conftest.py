"""Fixtures of the end-to-end tests: directories to run in, and finished runs that the tests of a module share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import Site


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def site(tmp_path: Path, cache: Path) -> Site:
    """A directory of one test."""
    return Site(tmp_path, cache)


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Site:
    """A directory that the tests of a module share."""
    return Site(tmp_path_factory.mktemp("site"), cache)


@pytest.fixture(scope="module")
def finished(shared_site: Site) -> Callable[..., str]:
    """Train a run to its end, once per module; its name.  precision and arguments (backend, processes) name it."""
    done: set[str] = set()

    def train(backend: str, precision: str = "fp32", **changes: Any) -> str:
        name = f"{backend}-{precision}"
        if name not in done:
            training = {"precision": precision, **changes.pop("training", {})}
            shared_site.run("train", shared_site.write(name, training=training, **changes), "--backend", backend)
            done.add(name)
        return name

    return train
