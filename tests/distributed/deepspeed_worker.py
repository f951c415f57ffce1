"""What one process of a DeepSpeed test does: every check of one world size in one go, since starting up takes seconds.

Run: python deepspeed_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.  Rank 0 leaves its findings in
FOLDER as worldN.json and worldN.npz; the tests read and judge them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxllm.run import Run
from jaxllm.state.portable import write_state
from jaxllm.state.training_state import Progress, TrainingState
from jaxllm.torch_backend import DeepSpeedBackend, bucket
from jaxllm.torch_backend import step as step_module
from tests.distributed.deepspeed_cases import make_batch, make_hyper, make_run, materialise, random_state

STAGES = (0, 1, 2, 3)


class Worker:
    def __init__(self, folder: Path) -> None:
        self.backend = DeepSpeedBackend()
        self.folder = folder
        self.results: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}

    @contextmanager
    def started(self, run: Run, state: TrainingState | None = None, training: bool = True) -> Iterator[DeepSpeedBackend]:
        """The backend at work on a run, its process group kept for the next one."""
        self.backend.start(run, state, training)
        yield self.backend
        assert self.backend._engine is not None
        self.backend._engine.close()

    def record(self, key: str, value: Any) -> None:
        self.results[key] = value

    def keep(self, key: str, state: TrainingState) -> None:
        """Keep every tensor of a state (collective)."""
        for kind in ("params", "exp_avg", "exp_avg_sq"):
            for name, values in materialise(getattr(state, kind)).items():
                self.arrays[f"{key}/{kind}/{name}"] = values

    def steps(self, backend: DeepSpeedBackend, first: int, last: int) -> list[tuple[float, float, float]]:
        made = []
        for step in range(first, last):
            result = backend.step(make_batch(step, backend.shard), make_hyper(step))
            made.append((float(result.loss), float(result.gradient_norm), float(result.target_tokens)))
        return made

    # ------------------------------------------------------------------------------------------------------------ checks

    def trajectory(self, family: str, precision: str, stage: int, **options: Any) -> None:
        """Four steps from the initialiser; the initial weights as they came back out; the loss of an evaluation."""
        key = "/".join([family, precision, f"zero{stage}", *options])
        with self.started(make_run(family, precision=precision, zero_stage=stage, **options)) as backend:
            self.keep(f"initial/{key}", backend.export(Progress()))
            evaluated = backend.evaluate(make_batch(100 + i, backend.shard) for i in range(2))
            self.record(f"evaluation/{key}", [evaluated.loss_sum, evaluated.target_tokens])
            self.record(f"steps/{key}", self.steps(backend, 0, 4))
            self.keep(f"final/{key}", backend.export(Progress(4, 4)))

    def in_buckets(self, precision: str, stage: int) -> None:
        """Gradients added up in several buckets, of which none has room for the largest weight."""
        limits = dict(bucket.LARGEST_BUCKET)
        bucket.LARGEST_BUCKET["cpu"] = 700
        with self.started(make_run("llama", precision=precision, zero_stage=stage)) as backend:
            self.record(f"steps/llama/{precision}/zero{stage}/buckets", self.steps(backend, 0, 4))
            self.keep(f"final/llama/{precision}/zero{stage}/buckets", backend.export(Progress(4, 4)))
        bucket.LARGEST_BUCKET.update(limits)

    def moved(self, precision: str, stage: int) -> None:
        """A state that came from elsewhere: as it comes back out, and three steps on."""
        key = f"{precision}/zero{stage}"
        run = make_run("llama", precision=precision, zero_stage=stage)
        state = random_state(run)
        folder = self.folder / "random_state"
        if self.backend.is_main and not folder.exists():
            write_state(state, folder, run.model.huggingface_config)
        self.backend.barrier("written")
        with self.started(run) as backend:
            self.steps(backend, 0, 1)  # what is there before must leave no trace
            backend.restore(folder)
            self.keep(f"restored/{key}", backend.export(state.progress))
            self.record(f"continued/{key}", self.steps(backend, 9, 12))
            self.keep(f"continued/{key}", backend.export(Progress(12, 10)))

    def resumed(self, precision: str, stage: int) -> None:
        """Two steps, save, two steps; and the same after a restart from what was saved.  Dropout is on."""
        key = f"{precision}/zero{stage}"
        dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
        run = make_run("gpt2", precision=precision, model=dropout, zero_stage=stage)
        folder = self.folder / f"saved-{precision}-{stage}-{self.backend.shard.count}"
        if self.backend.is_main:
            folder.mkdir()
        self.backend.barrier("folder")
        with self.started(run) as backend:
            self.steps(backend, 0, 2)
            backend.save(folder, Progress(2, 2, 16, 100))
            backend.wait()
            self.record(f"uninterrupted/{key}", self.steps(backend, 2, 4))
            self.keep(f"uninterrupted/{key}", backend.export(Progress(4, 4)))
        with self.started(run) as backend:
            backend.restore(folder)
            self.record(f"resumed/{key}", self.steps(backend, 2, 4))
            self.keep(f"resumed/{key}", backend.export(Progress(4, 4)))

    def guarded(self, precision: str, stage: int) -> None:
        """A NaN loss on the last process alone, then an infinite gradient under a finite loss, between two good steps."""
        key = f"{precision}/zero{stage}"
        with self.started(make_run("llama", precision=precision, zero_stage=stage)) as backend:
            self.steps(backend, 0, 1)
            self.keep(f"before_fault/{key}", backend.export(Progress(1, 1)))
            bad = make_batch(1, backend.shard)
            if backend.shard.index == backend.shard.count - 1:
                bad.weights[0, 0] = np.nan
            result = backend.step(bad, make_hyper(1))
            self.record(f"nan_loss/{key}", [float(result.loss), float(result.gradient_norm)])
            with infinite_gradient(backend.shard.index == 0):
                self.record(f"infinite_gradient/{key}", self.steps(backend, 1, 2)[0][:2])
            self.keep(f"after_fault/{key}", backend.export(Progress(3, 1)))
            self.record(f"after_fault/{key}", self.steps(backend, 1, 2))
        with self.started(make_run("llama", precision=precision, zero_stage=stage)) as backend:
            self.record(f"no_fault/{key}", self.steps(backend, 0, 2)[1:])

    def decoded(self, family: str, stage: int, training: bool, precision: str = "fp32") -> None:
        """Logits token by token, twice, the second time after another prompt."""
        key = f"{family}/{precision}/zero{stage}/{'training' if training else 'inference'}"
        tokens = [5, 17, 3, 44, 8, 29, 60]
        with self.started(make_run(family, precision=precision, zero_stage=stage), training=training) as backend:
            decoder = backend.decoder(len(tokens))
            decoder.prefill([1, 2, 3, 4])
            logits = [decoder.prefill(tokens[:3])] + [decoder.decode(token) for token in tokens[3:]]
            self.arrays[f"logits/{key}"] = np.stack(logits)
            if training:
                self.record(f"after_decoding/{key}", self.steps(backend, 0, 1))

    def agreement(self) -> None:
        last = self.backend.shard.count - 1
        self.record("any", [self.backend.any(False), self.backend.any(self.backend.shard.index == last)])
        self.record("device", self.backend.device_description())

    def run(self) -> None:
        self.agreement()
        self.trajectory("llama", "fp64", 0)
        for stage in STAGES:
            for family in ("llama", "gpt2"):
                self.trajectory(family, "fp32", stage)
            self.trajectory("llama", "bf16", stage)
            for precision in ("fp32", "bf16"):
                self.moved(precision, stage)
                self.resumed(precision, stage)
                self.guarded(precision, stage)
                if stage:
                    self.in_buckets(precision, stage)
            self.trajectory("llama", "fp32", stage, activation_checkpointing=True)
            for family, precision in (("llama", "fp32"), ("gpt2", "fp32"), ("llama", "bf16")):
                self.trajectory(family, precision, stage, loss_chunk=13)
        self.guarded("fp64", 0)
        self.resumed("fp64", 0)
        for family in ("llama", "gpt2"):
            for stage in (0, 3):
                self.decoded(family, stage, training=True)
                self.decoded(family, stage, training=False)
        self.finish(self.backend.shard.count)

    def finish(self, world: int) -> None:
        """Rank 0 leaves its findings; everybody leaves."""
        if self.backend.is_main:
            (self.folder / f"world{world}.json").write_text(json.dumps(self.results))
            np.savez(self.folder / f"world{world}.npz", **self.arrays)
        self.backend.barrier("done")
        self.backend.close()


class _Infinite(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


@contextmanager
def infinite_gradient(here: bool) -> Iterator[None]:
    """Within it, the loss of this process is as it was and its gradient is infinite."""
    names = ("weighted_loss", "chunked_loss")
    originals = {name: getattr(step_module, name) for name in names}

    def spoiled(original: Any, *arguments: Any) -> torch.Tensor:
        loss: torch.Tensor = original(*arguments)
        return _Infinite.apply(loss) if here else loss

    for name, original in originals.items():
        setattr(step_module, name, partial(spoiled, original))
    yield
    for name, original in originals.items():
        setattr(step_module, name, original)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Worker(Path(sys.argv[1])).run()
