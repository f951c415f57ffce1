"""A plan: which model and how much compute a run is, what it needs on each kind of device, and which settings fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.config import RunConfig, tokens_per_step, total_steps
from jaxllm.config.schema import BackendName
from jaxllm.errors import ConfigError
from jaxllm.families import Model, WeightRule
from jaxllm.metrics.flops import flops_per_token
from jaxllm.planning import scaling
from jaxllm.planning.devices import Devices
from jaxllm.planning.search import Candidate, Found, as_written, backends_on, search
from jaxllm.planning.setting import axes_of
from jaxllm.planning.utilization import Utilization, expected_utilization


@dataclass(frozen=True)
class Compute:
    """What a run is.  active: parameters that a token passes through, which are fewer where it takes some of many experts.

    flops: model FLOPs of all steps.  optimal: tokens at which this model is the best use of its FLOPs.  equivalent: parameters
    of the compute-optimal model that would reach the same loss.  Both count active parameters: the law is of FLOPs.  Both are
    None for another objective than causal-lm, of which the law says nothing.
    """

    objective: str

    parameters: int
    active: int
    steps: int
    tokens: int
    flops_per_token: float
    flops: float
    optimal: float | None
    equivalent: float | None

    @property
    def ratio(self) -> float:
        """Tokens for each active parameter."""
        return self.tokens / self.active


@dataclass(frozen=True)
class BackendPlan:
    """One backend on some devices.  written: the run file's own setting, or why it is not possible."""

    backend: BackendName
    written: Candidate | ConfigError
    found: Found


@dataclass(frozen=True)
class DevicePlan:
    """A run on some devices.  seconds: of the whole run with the best setting that fits, None when none does."""

    devices: Devices
    utilization: Utilization
    backends: Sequence[BackendPlan]
    seconds: float | None

    @property
    def chip_hours(self) -> float | None:
        """What the run costs."""
        return None if self.seconds is None else self.seconds * self.devices.chips / 3600

    @property
    def lacking(self) -> float:
        """Bytes that the smallest setting is too large by; 0 when one fits."""
        smallest = [plan.found.smallest.memory.peak for plan in self.backends if plan.found.smallest]
        if any(plan.found.fitting for plan in self.backends) or not smallest:
            return 0.0
        return min(smallest) - self.devices.usable_bytes


@dataclass(frozen=True)
class Budget:
    """What a number of chip-hours pays for on some devices: FLOPs, and tokens of this model.

    best, shape: the best model and its tokens; None for another objective than causal-lm.
    """

    devices: Devices
    utilization: Utilization
    flops: float
    tokens: float
    best: scaling.Optimum | None
    shape: tuple[int, int] | None


@dataclass(frozen=True)
class Plan:
    """Everything that `jaxllm plan` says."""

    compute: Compute
    devices: Sequence[DevicePlan]
    budgets: Sequence[Budget]

    @property
    def fits(self) -> bool:
        """Whether any setting fits anywhere."""
        return any(plan.seconds is not None for plan in self.devices)


def make_plan(config: RunConfig, model: Model, devices: Sequence[Devices], budget_hours: float | None = None) -> Plan:
    """Plan a run."""
    compute = compute_of(config, model)
    plans = [_device_plan(config, model, each, compute) for each in devices]
    budgets = [] if budget_hours is None else [_budget(config, model, each, budget_hours) for each in devices]
    return Plan(compute, plans, budgets)


def compute_of(config: RunConfig, model: Model) -> Compute:
    """Counts of a run."""
    tokens = total_steps(config) * tokens_per_step(config)
    each = flops_per_token(model.spec, config.data.sequence_length, config.data.target_length).training
    active = active_parameters(model)
    lawful = config.objective.kind == "causal-lm"
    return Compute(
        objective=config.objective.kind,
        parameters=model.parameters,
        active=active,
        steps=total_steps(config),
        tokens=tokens,
        flops_per_token=each,
        flops=each * tokens,
        optimal=scaling.optimal_tokens(active) if lawful else None,
        equivalent=scaling.equivalent(active, tokens) if lawful else None,
    )


def active_parameters(model: Model) -> int:
    """Parameters that a token passes through: of experts only those that it takes."""
    return sum(_active(model, rule) for rule in model.rules)


def _active(model: Model, rule: WeightRule) -> int:
    experts = model.spec.mlp.experts
    if experts is None or "experts" not in axes_of(rule):
        return rule.parameters
    return rule.parameters * experts.per_token // experts.count


def _device_plan(config: RunConfig, model: Model, devices: Devices, compute: Compute) -> DevicePlan:
    use = expected_utilization(devices.chip, compute.active)
    plans = [
        BackendPlan(backend, _written(config, model, backend, devices, use), search(config, model, backend, devices, use))
        for backend in backends_on(devices)
    ]
    fastest = [plan.found.fitting[0].speed.seconds for plan in plans if plan.found.fitting]
    return DevicePlan(devices, use, plans, min(fastest) * compute.steps if fastest else None)


def _written(
    config: RunConfig, model: Model, backend: BackendName, devices: Devices, use: Utilization
) -> Candidate | ConfigError:
    try:
        return as_written(config, model, backend, devices, use)
    except ConfigError as error:
        return error


def _budget(config: RunConfig, model: Model, devices: Devices, hours: float) -> Budget:
    """chip-hours x peak x MFU."""
    use = expected_utilization(devices.chip, active_parameters(model))
    each = use.counted(flops_per_token(model.spec, config.data.sequence_length, config.data.target_length))
    flops = hours * 3600 * devices.chip.bf16_flops * devices.chip.devices_per_chip * use.mfu
    if config.objective.kind != "causal-lm":
        return Budget(devices, use, flops, flops / each, None, None)
    best = scaling.optimum(flops)
    return Budget(devices, use, flops, flops / each, best, shape_of(model, best.parameters))


def shape_of(model: Model, parameters: float) -> tuple[int, int]:
    """Hidden size and layers of a model in this one's proportions with about that many parameters.

    Layers' weights grow with the square of the hidden size, embeddings with the size itself; width and depth grow together,
    and the hidden size is a multiple of 128, which matrix units prefer.
    """
    spec = model.spec
    layered = sum(_active(model, rule) for rule in model.rules if rule.layers) / spec.layers / spec.hidden_size**2
    outside = sum(rule.parameters for rule in model.rules if not rule.layers) / spec.hidden_size
    aspect = spec.hidden_size / spec.layers

    def size(hidden: int) -> float:
        return max(1, round(hidden / aspect)) * layered * hidden**2 + outside * hidden

    hidden = min(range(128, 65_536, 128), key=lambda each: abs(size(each) - parameters))
    return hidden, max(1, round(hidden / aspect))
