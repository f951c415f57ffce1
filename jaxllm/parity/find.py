"""`--find`: the first operation at which the two backends depart, and what each of them computes there.

The comparison follows the order of the computation: activations from the embedding to the logits, the loss, the gradients at
the same points backwards, the loss and gradients accumulated over micro-batches, the parameters after an optimiser step.  The
first error above the bound is where to look: everything before it agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from jaxllm.backend import create_probe
from jaxllm.config.schema import Precision
from jaxllm.data.batch import Batch
from jaxllm.data.prepare import PreparedData
from jaxllm.parity.diagnose import AS_CONFIGURED, Bench, Diagnosis, recognise_loss
from jaxllm.parity.inputs import counted
from jaxllm.parity.levels import OnePass, first_step, largest_gradient
from jaxllm.parity.results import finite
from jaxllm.parity.routing import decisions
from jaxllm.parity.tolerances import TOLERANCES, gradient_error, has_gradient, idle_parameters, relative_error
from jaxllm.probe import Array, Pass, Probe, of_source, point_names
from jaxllm.run import Run
from jaxllm.state import TensorReader
from jaxllm.state.initial import initial_weights

_NEIGHBOURS = 2


@dataclass(frozen=True)
class Step:
    """One comparison on the way.  stage: of the computation; name: the point or parameter; error: relative."""

    stage: str
    name: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        """NaN agrees with nothing."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Finding:
    """Where the backends depart.  steps: everything that was compared, in order, up to a little beyond the departure.

    departure: index into `steps`; None when all agree.  diagnosis: what each side computes there.
    """

    precision: Precision
    steps: tuple[Step, ...]
    departure: int | None
    diagnosis: str

    @property
    def agrees(self) -> bool:
        """Whether no departure was found."""
        return self.departure is None

    @property
    def first(self) -> Step | None:
        """The first step that departs."""
        return None if self.departure is None else self.steps[self.departure]

    def to_json(self) -> dict[str, Any]:
        """The finding in JSON's types; a number that is not finite becomes null."""
        steps = [{**asdict(step), "error": finite(step.error), "bound": finite(step.bound)} for step in self.steps]
        return {
            "precision": self.precision,
            "agrees": self.agrees,
            "departure": None if self.departure is None else steps[self.departure],
            "diagnosis": self.diagnosis,
            "steps": steps,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.departure is None:
            worst = max(self.steps, key=lambda step: step.error / step.bound)
            yield f"The backends agree at all {len(self.steps)} points ({self.precision}); "
            yield f"the largest error is {worst.error:.2e} at {worst.stage} {worst.name}, within {worst.bound:.0e}."
            return
        first = self.steps[self.departure]
        table = Table("stage", "point", "relative error", "", title=f"first departure, {self.precision}")
        begin = max(self.departure - _NEIGHBOURS, 0)
        for number, step in enumerate(self.steps[begin : self.departure + _NEIGHBOURS + 1], start=begin):
            mark = "<- departs here" if number == self.departure else ""
            table.add_row(step.stage, step.name, f"{step.error:.2e}", mark, style=None if step.agrees else "red")
        yield table
        yield f"The backends depart at {first.stage} {first.name}: relative error {first.error:.2e}, bound {first.bound:.0e}."
        yield f"There {self.diagnosis}."


def find(run: Run, data: PreparedData, precision: Precision, probes: tuple[Probe, Probe] | None = None) -> Finding:
    """Follow the computation on the run's first batch until the backends depart.

    probes: JAX's and the transformers model's; others in tests.  The precision is fp64 or fp32.
    """
    training = run.config.training.model_copy(update={"precision": precision})
    one_pass = OnePass.of_run(replace(run, config=run.config.model_copy(update={"training": training})), data)
    batch = next(iter(one_pass.inputs.values()))
    sides = probes or (create_probe("jax"), create_probe("deepspeed"))
    return _Search(one_pass.run, batch, sides).search()


class _Search:
    def __init__(self, run: Run, batch: Batch, probes: tuple[Probe, Probe]) -> None:
        self._run = run
        self._batch = batch
        self._precision = run.config.training.precision
        self._weights: TensorReader = initial_weights(run.model, run.config.seed)
        self._found, self._wanted = probes
        for probe in probes:
            probe.load(run, self._weights)

    def search(self) -> Finding:
        """Compare in order; stop a little after the first departure."""
        steps: list[Step] = []
        departure: int | None = None
        for step in self._steps():
            steps.append(step)
            if departure is None and not step.agrees:
                departure = len(steps) - 1
            if departure is not None and len(steps) > departure + _NEIGHBOURS:
                break
        said = "" if departure is None else self._explain(steps[departure])
        return Finding(self._precision, tuple(steps), departure, said)

    @cached_property
    def _captured(self) -> tuple[Pass, Pass]:
        return self._found.passes(self._batch, capture=True), self._wanted.passes(self._batch, capture=True)

    @cached_property
    def _accumulated(self) -> tuple[Pass, Pass]:
        return self._found.passes(self._batch), self._wanted.passes(self._batch)

    @cached_property
    def _stepped(self) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        hyper = first_step(self._run.config)
        return self._found.after_step(self._batch, hyper), self._wanted.after_step(self._batch, hyper)

    def _steps(self) -> Iterator[Step]:
        bound = TOLERANCES[self._precision].value
        found, wanted = self._captured
        names = point_names(self._run.model.spec)
        for name in names:
            real = counted(self._batch, wanted.values[name], of_source=of_source(name))
            yield Step("forward", name, relative_error(found.values[name][real], wanted.values[name][real]), bound)
        yield Step("loss", "of the batch as a whole", relative_error(found.loss, wanted.loss), bound)
        for name in reversed(names):
            real = counted(self._batch, wanted.values[name], of_source=of_source(name))
            error = relative_error(found.cotangents[name][real], wanted.cotangents[name][real])
            yield Step("backward", name, error, bound)
        found, wanted = self._accumulated
        yield Step("loss", "accumulated over micro-batches", relative_error(found.loss, wanted.loss), bound)
        largest = largest_gradient(wanted)
        idle = idle_parameters(self._run.model)
        for name, gradient in wanted.gradients.items():
            error = gradient_error(found.gradients[name], gradient, largest, idle=name in idle)
            yield Step("gradient of", name, error, bound)
        bound = TOLERANCES[self._precision].trajectory_parameters
        for name, value in self._stepped[1].items():
            moved = has_gradient(wanted.gradients[name], math.inf if name in idle else largest)
            yield Step("optimizer step of", name, relative_error(self._stepped[0][name][moved], value[moved]), bound)

    def _explain(self, step: Step) -> str:
        names = ("JAX", "transformers")
        if self._run.model.spec.head.kind != "causal-lm" and step.stage in ("forward", "loss"):
            return f"the results differ although everything before agrees: look at what computes {step.name}"
        if step.stage == "forward":
            found, wanted = self._captured
            if (tie := self._tie(step.name.replace("mlp_output", "router"), step.bound)) is not None:
                return tie
            bench = Bench(self._run.model, self._weights, self._batch, wanted.values)
            sides = (found.values[step.name], wanted.values[step.name])
            return str(bench.diagnose(step.name, dict(zip(names, sides, strict=True))))
        if step.stage == "loss":
            passes = self._accumulated if "micro" in step.name else self._captured
            rows = self._run.config.training.micro_batch or self._batch.rows
            losses = dict(zip(names, (one.loss for one in passes), strict=True))
            weights = self._batch.weights.astype(np.float64)
            return str(recognise_loss(losses, _token_losses(passes[1].logits, self._batch), weights, rows))
        if step.stage == "optimizer step of":
            return str(self._recognise_update(step.name, names))
        return f"the gradient differs although everything forward agrees: look at the derivative of what follows {step.name}"

    def _tie(self, router: str, bound: float) -> str | None:
        """What to say where the experts differ because their router's choices do, all of which are ties."""
        found, wanted = (each.choices for each in self._captured)
        if router not in wanted:
            return None
        decided = decisions(self._batch, {router: found[router]}, {router: wanted[router]})
        if decided.different == 0 or decided.gap > bound:
            return None
        return (
            f"{decided}: ties that rounding breaks, to within {decided.gap:.1e} of the router's logits; --level fp64 tells more"
        )

    def _recognise_update(self, name: str, sides: tuple[str, str]) -> Diagnosis:
        """Whether each side's update of a parameter holds weight decay: AdamW's two terms, computed here in float64."""
        optimizer = self._run.config.optimizer
        before = np.asarray(self._weights.read(name), np.float64)
        gradients = {key: np.asarray(value, np.float64) for key, value in self._accumulated[1].gradients.items()}
        norm = np.sqrt(sum(np.square(value).sum() for value in gradients.values()))
        factor = min(1.0, optimizer.clip_norm / (norm + 1e-6)) if optimizer.clip_norm else 1.0
        gradient = gradients[name] * factor
        adam = optimizer.learning_rate * gradient / (np.abs(gradient) + optimizer.eps)
        decay = optimizer.learning_rate * optimizer.weight_decay * before
        decays = any(rule.decays for rule in self._run.model.rules if name in rule.names)
        plain, decayed = before - adam, before - decay - adam
        candidates = {
            AS_CONFIGURED: decayed if decays else plain,
            ("an update without weight decay" if decays else "an update with weight decay"): plain if decays else decayed,
        }
        after = dict(zip(sides, (stepped[name] for stepped in self._stepped), strict=True))
        apart = relative_error(*after.values())
        computed = {}
        for side, value in after.items():
            error, said = min(
                ((relative_error(value, candidate), said) for said, candidate in candidates.items()), key=itemgetter(0)
            )
            if error <= 0.1 * apart:
                computed[side] = said
        return Diagnosis(computed)


def _token_losses(logits: Array, batch: Batch) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Cross-entropy of every target, (B, S)."""
    wide = np.asarray(logits, np.float64)
    peak = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - peak).sum(-1)) + peak[..., 0]
    chosen = np.take_along_axis(wide, batch.targets[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.asarray(total - chosen, np.float64)
