"""Fixtures of the JAX backend's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxllm.jax_backend import JaxBackend
from jaxllm.run import Run


@pytest.fixture
def start() -> Iterator[Callable[..., JaxBackend]]:
    """`start(run, state=None, training=True)`: a started backend, closed after the test."""
    started: list[JaxBackend] = []

    def build(run: Run, state: Any = None, training: bool = True) -> JaxBackend:
        backend = JaxBackend()
        backend.start(run, state, training)
        started.append(backend)
        return backend

    yield build
    for backend in started:
        backend.close()
