"""THE loop: batches, steps, evaluation, checkpoints, metrics.  It sees a backend only through its protocol.

prepare_run   data, model and steps of a run file
prepare       what a run is before any device is touched: data, model, steps, the checkpoint to resume from
train         one run, from its first (or resumed) step to its last, its sample and its picture
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from jaxllm.backend import Backend
from jaxllm.checkpointing import Identity, Saver, drop_portable, find_checkpoint, open_state, portable_state
from jaxllm.config import RunConfig, tokens_per_step, total_steps
from jaxllm.data.batch import Batch
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, SplitName
from jaxllm.data.prepare import prepare as prepare_data
from jaxllm.errors import JaxllmError
from jaxllm.evaluation import evaluate
from jaxllm.evaluation.written import write_targets
from jaxllm.families import check_sequence_length, resolve_model, task_of
from jaxllm.families.rates import rate_scales
from jaxllm.generation import Sampling, generate, prompt_tokens
from jaxllm.generation.search import Search
from jaxllm.interrupts import StopRequest
from jaxllm.ledger import Ledger
from jaxllm.metrics.chips import peak_flops
from jaxllm.metrics.environment import describe_environment
from jaxllm.metrics.flops import flops_per_token
from jaxllm.metrics.meter import Meter
from jaxllm.metrics.records import TrainRecord, ValidationRecord
from jaxllm.metrics.sinks import Sinks, make_sinks
from jaxllm.objectives import open_examples
from jaxllm.run import Run
from jaxllm.run_folder import RunFolder, resolved
from jaxllm.schedule import check_schedule, hyper
from jaxllm.state import Progress
from jaxllm.state.initial import compare_folder
from jaxllm.state.store import Checkpoint, CheckpointStore

_SAMPLED = 3  # examples whose targets a run writes at its end


@dataclass(frozen=True)
class Plan:
    """A run before any device is touched.  checkpoint: where it resumes from; fresh: a run folder is to be made."""

    run: Run
    data: PreparedData
    folder: RunFolder
    identity: Identity
    checkpoint: Checkpoint | None
    fresh: bool
    overwrite: bool

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        keep = self.run.config.checkpoint
        return CheckpointStore(self.folder.checkpoints, keep.keep, keep.keep_every)


def prepare_run(config: RunConfig, *, progress: bool) -> tuple[Run, PreparedData]:
    """The data, the model and the number of steps of a run file; raises JaxllmError for what does not fit together."""
    data = prepare_data(config, progress=progress)
    model = resolve_model(config.model, data.tokenizer.vocabulary, task=task_of(config.objective))
    check_sequence_length(model, config)
    rate_scales(model, config.optimizer)  # refuses patterns that name no weight
    run = Run(config, model, total_steps(config))
    check_schedule(run.total_steps, config.schedule)
    return run, data


def prepare(
    config: RunConfig,
    *,
    resume: bool,
    overwrite: bool,
    allow_changed: Sequence[str],
    report: Callable[[str], None],
    progress: bool,
) -> Plan:
    """Everything that can go wrong before the first step, as far as it does not need the devices.

    resume: go on from the newest checkpoint of the run folder, or start where there is none.  overwrite: delete the run that
    is there.  allow_changed: keys that may differ from the checkpoint's.  report: told what a person should know.  Raises
    JaxllmError.
    """
    run, data = prepare_run(config, progress=progress)
    folder = RunFolder(config.folder)
    identity = Identity(resolved(config, run.model), data.fingerprint)
    fresh = not (resume and folder.holds_a_run())
    plan = Plan(run, data, folder, identity, None, fresh, overwrite)
    if fresh:
        if not overwrite:
            folder.refuse_a_run()
        for split in ("train", "validation"):  # what no example can be made of ends the run before its folder is made
            open_examples(data, config, split)
        pretrained = run.model.pretrained
        if pretrained is not None:
            for sentence in compare_folder(run.model, Path(pretrained)).sentences(Path(pretrained)):
                report(sentence)
        return plan
    checkpoint = find_checkpoint(plan.store, identity, allow_changed, report)
    if checkpoint is None:
        report(f"{folder.path} has no checkpoint yet; starting from step 0")
    return replace(plan, checkpoint=checkpoint)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.  interrupted: stopped by a signal, saved, and to be resumed."""

    progress: Progress
    interrupted: bool
    validation: ValidationRecord | None


def train(plan: Plan, backend: Backend, resume_command: str) -> Outcome:
    """Run the plan to its end (collective).  resume_command: shown to whoever interrupts it."""
    with StopRequest() as stop:
        try:
            progress = _start(plan, backend)
            return _Loop(plan, backend, progress, stop, resume_command).run()
        finally:
            backend.close()


def _start(plan: Plan, backend: Backend) -> Progress:
    """Fill the backend from the plan's checkpoint or from the beginning, and make the run folder."""
    checkpoint = plan.checkpoint
    if checkpoint is None:
        backend.start(plan.run, None)
    elif checkpoint.backend == backend.name == "jax":
        backend.start(plan.run, None)
        backend.restore(checkpoint.folder)
    elif backend.name == "jax":
        backend.start(plan.run, open_state(checkpoint.folder, plan.run.model))
    else:
        backend.start(plan.run, portable_state(checkpoint))
    if backend.is_main:
        _make_folder(plan, backend)
        if checkpoint is not None:
            drop_portable(checkpoint)
    backend.barrier("run folder")
    if not plan.folder.holds_a_run():
        raise JaxllmError(
            f"another process made {plan.folder.path}, and this one does not see it; set output_dir to a folder that all hosts "
            "share"
        )
    return checkpoint.progress if checkpoint else Progress()


def _make_folder(plan: Plan, backend: Backend) -> None:
    described = describe_environment(backend.device_description())
    plan.folder.create(plan.run.config, plan.run.model, described, overwrite=plan.overwrite and plan.fresh)
    plan.data.tokenizer.save(plan.folder.tokenizer)
    if plan.checkpoint is None:
        # A run that was killed before its first checkpoint starts over: what it left must not mix with what comes.
        plan.folder.metrics.unlink(missing_ok=True)
        shutil.rmtree(plan.folder.path / "tensorboard", ignore_errors=True)


class _Loop:
    """One run while it goes."""

    def __init__(self, plan: Plan, backend: Backend, progress: Progress, stop: StopRequest, resume_command: str) -> None:
        self._plan = plan
        self._config = plan.run.config
        self._total = plan.run.total_steps
        self._backend = backend
        self._stop = stop
        self._resume_command = resume_command
        self._start_step = progress.step
        self._saved_step = progress.step if plan.checkpoint else -1
        self._ledger = Ledger(progress, self._config.training)
        self._saver = Saver(backend, plan.store, plan.identity, plan.data.tokenizer)
        self._meter = self._make_meter()
        self._sinks = self._make_sinks()
        self._validation: ValidationRecord | None = None

    def run(self) -> Outcome:
        """The steps that are left, then what comes after the last one."""
        with self._sinks, self._batches("train", self._start_step) as batches:
            self._sinks.open(self._total, self._start_step)
            self._announce()
            try:
                interrupted = self._steps(batches)
                if not interrupted and self._start_step < self._total:
                    self._evaluate()
                self._save()
            finally:
                self._saver.wait()
            if interrupted:
                self._sinks.message(f"stopped after step {self._ledger.step} and saved; go on with: {self._resume_command}")
            else:
                self._finish()
        return Outcome(self._ledger.settle(), interrupted, self._validation)

    def _steps(self, batches: Iterator[Batch]) -> bool:
        """Step until the run is complete (False) or a signal came (True)."""
        config, total = self._config, self._total
        tokens = tokens_per_step(config)
        while self._ledger.step < total:
            result = self._backend.step(next(batches), hyper(self._ledger.step, self._ledger.updates, total, config))
            self._ledger.add(result)
            self._meter.step(tokens)
            step = self._ledger.step
            if _due(step, config.logging.every) or step in (self._start_step + 1, total):
                self._log()
            if self._backend.any(self._stop.requested):
                return step < total
            if _due(step, config.evaluation.every) and step < total:
                self._evaluate()
            if _due(step, config.checkpoint.every):
                self._save()
        return False

    def _log(self) -> None:
        """Report the step that was just taken, once it is done."""
        progress, last = self._ledger.settle(), self._ledger.last
        if last is None:
            return
        rates = self._meter.lap()
        applied = hyper(last.step - 1, 0, self._total, self._config)
        self._sinks.train(
            TrainRecord(
                step=last.step,
                loss=last.loss,
                learning_rate=applied.learning_rate,
                gradient_norm=last.gradient_norm,
                tokens_per_second=rates.tokens_per_second,
                model_tflops=rates.model_tflops,
                mfu=rates.mfu,
                memory_bytes=self._backend.memory_bytes(),
                tokens=progress.tokens,
                seconds=self._meter.seconds,
                seconds_left=self._meter.seconds_left,
                statistics=last.statistics,
            )
        )

    def _evaluate(self) -> None:
        """The loss on the validation split."""
        step = self._ledger.settle().step
        begun = self._meter.seconds
        with self._meter.pause():
            evaluated = evaluate(self._backend, self._plan.run, self._plan.data)
        self._validation = evaluated.record(step, self._meter.seconds - begun)
        self._sinks.validation(self._validation)

    def _save(self) -> None:
        """Save the state after the steps so far, unless it is saved already."""
        progress = self._ledger.settle()
        if progress.step != self._saved_step:
            with self._meter.pause():
                self._saver.save(progress)
            self._saved_step = progress.step

    def _finish(self) -> None:
        """After the last step: a sample, where the model writes text, and the picture of the loss."""
        plain = self._config.objective.kind == "causal-lm"
        if plain:
            self._write_sample()
        elif self._config.objective.kind == "seq2seq":
            self._write_targets()
        if self._backend.is_main:
            from jaxllm.metrics.plot import plot_losses

            # The entropy of the tokens' frequencies is a loss to compare with only where every token is predicted.
            entropy = self._plan.data.unigram_entropy if plain else None
            plot_losses(self._plan.folder.metrics, self._plan.folder.plot, entropy)
        skipped = f"; {self._ledger.skipped} steps left out" if self._ledger.skipped else ""
        self._sinks.message(f"done: {self._plan.folder.path} after {self._total} steps{skipped}")

    def _write_sample(self) -> None:
        """Continue the prompt of the run file; every process decodes, one writes."""
        settings, tokenizer = self._config.sample, self._plan.data.tokenizer
        prompt = prompt_tokens(tokenizer, settings.prompt)
        new_tokens = min(settings.max_new_tokens, self._plan.run.model.spec.max_positions - len(prompt))
        if new_tokens < 1:
            return
        decoder = self._backend.decoder(len(prompt) + new_tokens)
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, self._config.seed)
        tokens = list(generate(decoder, prompt, sampling, new_tokens, stop=tokenizer.eos_id))
        text = settings.prompt + tokenizer.decode(tokens)
        if self._backend.is_main:
            self._plan.folder.sample.write_text(text + "\n")
        self._sinks.message(f"sample:\n{text}")

    def _write_targets(self) -> None:
        """Targets of the first sources of the validation split, beside those of the data; every process decodes, one writes."""
        settings, run = self._config.sample, self._plan.run
        if settings.max_new_tokens < 1:
            return
        search = Search(1, min(settings.max_new_tokens, run.config.data.target_length or run.config.data.sequence_length))
        written = write_targets(self._backend, run, self._plan.data, search, limit=_SAMPLED)
        text = "\n".join(f"source:  {each.source}\ntarget:  {each.target}\nwritten: {each.written}\n" for each in written)
        if self._backend.is_main:
            self._plan.folder.sample.write_text(text)
        self._sinks.message(f"sample:\n{text.rstrip()}")

    def _announce(self) -> None:
        data, model = self._plan.data, self._plan.run.model
        begins = f"going on after step {self._start_step}" if self._start_step else "starting"
        begins = "already complete" if self._start_step >= self._total else begins
        self._sinks.message(
            f"{begins}: {model.family}, {model.parameters:,} parameters, {self._total} steps of "
            f"{tokens_per_step(self._config):,} tokens, backend {self._backend.name}; data: {data.train.tokens:,} training and "
            f"{data.validation.tokens:,} validation tokens, unigram entropy {data.unigram_entropy:.4f}"
        )

    def _batches(self, split: SplitName, start: int = 0) -> BatchPipeline:
        return BatchPipeline(self._plan.data, self._config, split, self._backend.shard, start)

    def _make_meter(self) -> Meter:
        described = self._backend.device_description()
        data = self._config.data
        flops = flops_per_token(self._plan.run.model.spec, data.sequence_length, data.target_length).training
        chip, devices = described.get("chip"), described.get("devices")
        peak = peak_flops(str(chip), devices, self._config.training.precision) if isinstance(devices, int) else None
        return Meter(self._total, self._start_step, flops, peak)

    def _make_sinks(self) -> Sinks:
        return make_sinks(self._config, self._plan.folder.path, Console()) if self._backend.is_main else Sinks([])


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
