"""Finished runs made by hand: losses, and states on disk, as `jaxllm train` leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import Precision
from jaxllm.parity.layouts import Layout
from jaxllm.parity.runs import FinishedRun
from jaxllm.run_folder import RunFolder
from jaxllm.state import Progress, TrainingState, write_state
from tests.parity.trajectories import make_run

Arrays = Mapping[str, NDArray[Any]]


class Reader:
    """Arrays in memory as a TensorReader."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def names(self) -> Sequence[str]:
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> NDArray[Any]:
        return self._arrays[name] if index is None else self._arrays[name][tuple(index)]


def finished(
    folder: Path,
    name: str,
    losses: Sequence[float],
    params: Mapping[int, Arrays],
    gradients: Arrays | None = None,
    precision: Precision = "fp64",
) -> FinishedRun:
    """A run with these losses from step 1 on, and these parameters after some steps.

    gradients: the root of the second moments; default, 1 everywhere.
    """
    run_folder = RunFolder(folder / name)
    for step, arrays in params.items():
        sizes = gradients or {key: np.ones_like(values) for key, values in arrays.items()}
        moments = Reader({key: np.square(values) for key, values in sizes.items()})
        state = TrainingState(Progress(step, step), Reader(arrays), moments, moments)
        write_state(state, run_folder.checkpoints / f"step-{step:08d}", {}, dtype="float64")
    run = make_run("llama", precision, len(losses))
    return FinishedRun(name, run, run_folder, dict(enumerate(losses, start=1)), None)


class HandMade:
    """In place of `Runs`: runs that were made by hand, by backend and precision."""

    def __init__(self, made: Mapping[tuple[str, str], FinishedRun], control: FinishedRun | None = None) -> None:
        self._made = made
        self._control = control
        self.steps = max(len(run.losses) for run in made.values())

    def finished(self, layout: Layout) -> FinishedRun:
        if layout.micro_batch is not None:
            assert self._control is not None
            return self._control
        return self._made[layout.backend, layout.precision]

    def control_layout(self, precision: Precision) -> Layout | None:
        return Layout("jax", precision, micro_batch=2) if self._control is not None else None

    def discard(self, run: FinishedRun) -> None:
        """Nothing is to be deleted."""
