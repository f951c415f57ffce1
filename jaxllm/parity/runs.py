"""Real `jaxllm train` runs in processes of their own, and what they leave behind.

A run of the user's file is changed only in what the comparison needs: how long, in which numbers, on which devices, and what
is written.  Everything is written below one folder, which whoever makes it removes.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.backend import check_layout
from jaxllm.checkpointing import open_state
from jaxllm.config import write_yaml
from jaxllm.config.schema import ParallelConfig, Precision, RunConfig
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.families import Model
from jaxllm.metrics.sinks.jsonl import parse_metrics
from jaxllm.parity.layouts import Layout
from jaxllm.run import Run
from jaxllm.run_folder import RunFolder, resolved
from jaxllm.state import TrainingState
from jaxllm.state.store import CheckpointStore

MAX_STATES = 25
MAX_STATE_BYTES = 2 * 10**9
_EVALUATION_BATCHES = 2
# How long a run may take to save and stop after Ctrl-C before it is ended.
_GRACE_SECONDS = 30.0


def state_spacing(parameters: int, precision: Precision, steps: int) -> int:
    """Steps between two saved states of a run: 1 where they are small.

    A run keeps at most MAX_STATES states and MAX_STATE_BYTES (weights and both moments), but always one halfway, from which
    a switched run goes on, and one at the end.
    """
    state = parameters * 3 * (8 if precision == "fp64" else 4)
    states = max(min(MAX_STATES, MAX_STATE_BYTES // state), 1)
    return max(min(math.ceil(steps / states), steps // 2), 1)


@dataclass(frozen=True)
class FinishedRun:
    """A run that was trained to its end.

    losses: of each step; validation: after the last one.  kept: parameters by step, for whoever compares others with this run.
    """

    name: str
    run: Run
    folder: RunFolder
    losses: Mapping[int, float]
    validation: float | None
    kept: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def precision(self) -> Precision:
        """The numbers it was computed in."""
        return self.run.config.training.precision

    def saved_steps(self) -> list[int]:
        """Steps after which its state was saved."""
        return CheckpointStore(self.folder.checkpoints).steps()

    def state(self, step: int) -> TrainingState:
        """Its state after a step, read tensor by tensor."""
        return open_state(self.folder.checkpoints / f"step-{step:08d}", self.run.model)


class Runs:
    """Trains the run of a file in any layout, each layout once.

    run: resolved, dropout off.  folder: for everything that is written.  steps: of every run.  environment: of the processes;
    default, this one's.  report: told what is being run.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        steps: int,
        environment: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._folder = folder
        self._environment = dict(os.environ if environment is None else environment)
        self._report = report
        self._finished: dict[str, FinishedRun] = {}
        self.steps = steps

    @property
    def run(self) -> Run:
        """The run of the file."""
        return self._run

    def finished(self, layout: Layout) -> FinishedRun:
        """The run in this layout, from the first step to the last."""
        if layout.slug not in self._finished:
            self._report(f"{layout.precision}: {layout.name}")
            self._finished[layout.slug] = self._train(layout, layout.slug, layout.name)
        return self._finished[layout.slug]

    def switched(self, first: Layout, second: Layout) -> tuple[int, FinishedRun]:
        """The run that begins in one layout and, from the middle on, goes on in another; and the step it changed after."""
        source = self.finished(first)
        step = self.switch_step(source)
        name = f"{first.name}, then {second.name}"
        self._report(f"{first.precision}: {name}")
        slug = f"{first.slug}-then-{second.slug}"
        target = RunFolder(self._folder / slug)
        checkpoint = f"step-{step:08d}"
        target.checkpoints.mkdir(parents=True)
        shutil.copytree(source.folder.checkpoints / checkpoint, target.checkpoints / checkpoint)
        shutil.copyfile(source.folder.config, target.config)
        shutil.copyfile(source.folder.metrics, target.metrics)
        return step, self._train(second, slug, name, "--resume")

    def switch_step(self, source: FinishedRun) -> int:
        """The saved step that is nearest to the middle."""
        return min(source.saved_steps(), key=lambda step: abs(step - self.steps / 2))

    def discard(self, finished: FinishedRun) -> None:
        """Delete the saved states of a run that is not needed any more."""
        shutil.rmtree(finished.folder.checkpoints, ignore_errors=True)
        self._finished = {slug: run for slug, run in self._finished.items() if run is not finished}

    def misfit(self, layout: Layout) -> str | None:
        """Why this run cannot be laid out like that; None when it can."""
        rows, spec = self._run.config.training.global_batch, self._run.model.spec
        if rows % layout.data_parallel:
            return f"global_batch {rows} cannot be split over {layout.data_parallel} groups of devices"
        split = {"heads": spec.attention.heads, "key/value heads": spec.attention.kv_heads}
        for what, count in split.items():
            if count % layout.tensor:
                return f"{count} {what} cannot be split over tensor {layout.tensor}"
        try:
            check_layout(_laid_out(self._run.config, layout), self._run.model, layout.devices)
        except ConfigError as error:
            return f"{error.key}: {error.message}"
        return None

    def control_layout(self, precision: Precision) -> Layout | None:
        """JAX on one device with another micro-batch than the run has; None if there is none that computes the same."""
        training = self._run.config.training
        if balances(self._run.model):
            return None
        rows = training.global_batch
        used = _micro_batch(training.micro_batch, rows) or rows
        sizes = (size for size in (*range(used - 1, 0, -1), *range(used + 1, rows + 1)) if rows % size == 0)
        size = next(sizes, None)
        return None if size is None else Layout("jax", precision, micro_batch=size)

    def _train(self, layout: Layout, slug: str, name: str, *arguments: str) -> FinishedRun:
        document = run_document(self._run, layout, self.steps) | {"name": slug, "output_dir": str(self._folder)}
        file = self._folder / f"{slug}.yaml"
        file.write_text(write_yaml(document))
        command = [sys.executable, "-m", "jaxllm", "train", str(file), "--backend", layout.backend, *arguments]
        if layout.processes > 1:
            command += ["--processes", str(layout.processes)]
        status, said = _call(command, self._environment)
        if status:
            raise JaxllmError(f"the {layout.precision} run on {name} failed: {_last_words(said, file)}")
        return self._read(layout, slug, name)

    def _read(self, layout: Layout, slug: str, name: str) -> FinishedRun:
        folder = RunFolder(self._folder / slug)
        records = parse_metrics(folder.metrics.read_text())
        losses = {line["step"]: _number(line["loss"]) for line in records if line["split"] == "train"}
        validation = [_number(line["loss"]) for line in records if line["split"] == "validation"]
        if sorted(losses) != list(range(1, self.steps + 1)):
            raise JaxllmError(f"the {layout.precision} run on {name} stopped after step {max(losses, default=0)}; run again")
        training = self._run.config.training.model_copy(update={"precision": layout.precision})
        config = self._run.config.model_copy(update={"training": training})
        run = Run(config, self._run.model, self.steps)
        return FinishedRun(name, run, folder, losses, validation[-1] if validation else None)


def run_document(run: Run, layout: Layout, steps: int) -> dict[str, Any]:
    """The run file of one run: the user's, with what the comparison needs changed; `name` and `output_dir` are left."""
    config = run.config
    document = resolved(config, run.model)
    rows = config.training.global_batch // layout.data_parallel
    wanted = rows if balances(run.model) else config.training.micro_batch
    document["training"] |= {
        "steps": steps,
        "tokens": None,
        "precision": layout.precision,
        "micro_batch": layout.micro_batch or _micro_batch(wanted, rows),
        "non_finite": "stop",
    }
    warmup = config.schedule.warmup_steps
    document["schedule"]["warmup_steps"] = min(math.ceil(warmup * steps / run.total_steps), steps)
    document["evaluation"] = {"every": None, "batches": min(config.evaluation.batches or 1, _EVALUATION_BATCHES)}
    spacing = state_spacing(run.model.parameters, layout.precision, steps)
    document["checkpoint"] = {"every": spacing, "keep": None, "keep_every": None}
    document["logging"] = {"every": 1, "sinks": ["jsonl"]}
    document["sample"] |= {"max_new_tokens": 0}
    laid_out = _laid_out(config, layout)
    document["deepspeed"], document["parallel"] = laid_out.deepspeed.model_dump(), laid_out.parallel.model_dump()
    document["jax"]["cpu_devices"] = layout.devices // layout.processes if layout.backend == "jax" else 1
    return document


def balances(model: Model) -> bool:
    """Whether load balancing is part of the loss: one number of a micro-batch, so that other micro-batches are another loss."""
    return model.spec.mlp.experts is not None and model.spec.mlp.experts.balance > 0.0


def _laid_out(config: RunConfig, layout: Layout) -> RunConfig:
    """The run file's mesh and ZeRO stage replaced by the layout's; offload is kept where the stage has it."""
    mesh = {"data": layout.data_parallel, "tensor": layout.tensor, "context": layout.context}
    if layout.backend == "jax":
        mesh |= {"data": layout.data, "fsdp": layout.fsdp}
    zero: dict[str, Any] = {"zero_stage": layout.zero_stage}
    if layout.zero_stage == 0:
        zero["offload_optimizer"] = "none"
    if layout.zero_stage < 3:
        zero["offload_param"] = "none"
    changed = {
        "backend": layout.backend,
        "training": config.training.model_copy(update={"precision": layout.precision}),
        "parallel": ParallelConfig(**mesh),
        "deepspeed": config.deepspeed.model_copy(update=zero),
    }
    return config.model_copy(update=changed)


def _micro_batch(wanted: int | None, rows: int) -> int | None:
    """The largest part of `rows` that fits into the wanted micro-batch."""
    return None if wanted is None else next(size for size in range(min(wanted, rows), 0, -1) if rows % size == 0)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _call(command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status of a command and what it wrote to stderr.  After an interrupt it may finish its step and save."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        raise
    return process.returncode, said


def _last_words(said: str, file: Path) -> str:
    """The sentence that a failing run ended with, without the place in a run file that the user has not written."""
    lines = [line for line in said.strip().splitlines() if line.strip()] or ["it ended without a word"]
    last = lines[-1].removeprefix("error: ")
    place, _, rest = last.partition(": ")
    return rest if place.startswith(str(file)) else last
