"""What one process of a DeepSpeed group does for the trajectory tests: all families and stages in one go.

Run: python zero_worker.py FOLDER STEPS FAMILY..., in a group.  Where FOLDER/switch-FAMILY holds the state of a run on the other
backend, stage 3 goes on with it, and stage 2 leaves its own state of the same step in FOLDER/zero2-FAMILY.  With Llama go the
layouts of processes that share rows.  Rank 0 leaves what it found in FOLDER/KEY.npz.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.run import Run
from jaxllm.state import TrainingState, read_state
from jaxllm.torch_backend import DeepSpeedBackend
from tests.parity.trajectories import SHARING, Trained, make_run, take_steps

PROCESSES = 2
STAGES = (0, 1, 2, 3)
SERIES, TENSORS = ("losses", "norms"), ("params", "exp_avg_sq")


def write(path: Path, trained: Trained) -> None:
    """Keep what was found."""
    steps = sorted(trained.losses)
    found: dict[str, Any] = {"steps": steps, **{what: [getattr(trained, what)[step] for step in steps] for what in SERIES}}
    found |= {f"{part}/{name}": values for part in TENSORS for name, values in getattr(trained, part).items()}
    np.savez(path, **found)


def read(path: Path) -> Trained:
    """What was kept."""
    with np.load(path) as arrays:
        steps = arrays["steps"].tolist()
        series = [dict(zip(steps, arrays[what].tolist(), strict=True)) for what in SERIES]
        tensors = [
            {name.removeprefix(f"{part}/"): arrays[name] for name in arrays.files if name.startswith(f"{part}/")}
            for part in TENSORS
        ]
        return Trained(*series, *tensors)


def main(folder: Path, steps: int, families: Sequence[str]) -> None:
    backend = DeepSpeedBackend()

    def train(key: str, run: Run, state: TrainingState | None = None, stop: int = steps, keep: Path | None = None) -> None:
        backend.start(run, state)
        trained = take_steps(backend, run, state.progress.step if state else 0, stop, keep)
        assert backend._engine is not None
        backend._engine.close()  # the process group stays for the next run
        if backend.is_main:
            write(folder / f"{key}.npz", trained)

    for family in families:
        runs = {stage: make_run(family, "fp32", steps, {}, PROCESSES, zero_stage=stage) for stage in STAGES}
        for stage, run in runs.items():
            train(f"{family}-zero{stage}", run)
        if (folder / f"switch-{family}").exists():
            train(f"{family}-to-zero3", runs[3], read_state(folder / f"switch-{family}"))
            train(f"{family}-from-zero2", runs[2], stop=steps // 2, keep=folder / f"zero2-{family}")
    for key, (mesh, options) in SHARING.items() if "llama" in families else ():
        train(key, make_run("llama", "fp32", steps, mesh, groups=1, **options))
    backend.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
