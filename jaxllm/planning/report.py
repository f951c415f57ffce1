"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.metrics.format import duration, memory
from jaxllm.planning import scaling
from jaxllm.planning.plan import BackendPlan, Budget, Compute, DevicePlan, Plan
from jaxllm.planning.search import Candidate

_NUMBERS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
_BACKENDS = {"jax": "JAX", "deepspeed": "DeepSpeed"}


def lines(plan: Plan, best: int = 3) -> Iterator[str]:
    """The plan for a terminal.  best: settings shown for each backend on each kind of device."""
    yield from _compute_lines(plan.compute)
    for each in plan.devices:
        yield ""
        yield from _device_lines(each, best)
    for budget in plan.budgets:
        yield ""
        yield from _budget_lines(budget)


def large(value: float) -> str:
    """`6.15 billion`."""
    if value < 0.01:
        return "under 0.01"
    unit, name = next(((unit, name) for unit, name in _NUMBERS if value >= unit), (1.0, ""))
    return f"{value / unit:.3g} {name}".strip()


def _compute_lines(compute: Compute) -> Iterator[str]:
    active = "" if compute.active == compute.parameters else f", of which a token passes through {compute.active:,}"
    yield f"model           {compute.parameters:,} parameters{active}"
    yield f"compute         {compute.flops_per_token:.3g} FLOPs per token, {compute.flops:.3g} in all (forward and backward)"
    kind = "parameter" if compute.active == compute.parameters else "active parameter"
    yield f"tokens          {compute.tokens:,} in {compute.steps:,} steps, {compute.ratio:.1f} per {kind}"
    if compute.optimal is None or compute.equivalent is None:
        said = f"the laws of compute-optimal training are of causal language models and say nothing of {compute.objective}"
        yield f"                {said}"
        return
    yield f"                compute-optimal for this size: {large(compute.optimal)} tokens ({scaling.SOURCE})"
    yield f"                {scaling.meaning(compute.active, compute.tokens)}"
    same = f"a compute-optimal model of {large(compute.equivalent)} parameters would reach the same loss"
    yield f"                {same} (the law's estimate)"


def _device_lines(plan: DevicePlan, best: int) -> Iterator[str]:
    devices = plan.devices
    chips = f"{devices.chips} x {devices.chip.name}"
    yield f"{devices.written}: {chips}, {memory(devices.usable_bytes)} of {memory(devices.chip.memory_bytes)} usable per device"
    if plan.seconds is not None and plan.chip_hours is not None:
        yield f"  time  {duration(plan.seconds)} with the best setting, {large(plan.chip_hours)} chip-hours"
        yield f"        at {plan.utilization.mfu:.1%} of peak ({plan.utilization.source})"
    for backend in plan.backends:
        yield from _backend_lines(backend, devices.usable_bytes, best)


def _backend_lines(plan: BackendPlan, usable: float, best: int) -> Iterator[str]:
    yield f"  {_BACKENDS[plan.backend]}"
    if isinstance(plan.written, ConfigError):
        yield f"    as written  not possible: {plan.written}"
    else:
        peak = plan.written.memory.peak
        verdict = "fits" if peak <= usable else f"does not fit, by {memory(peak - usable)}"
        yield f"    as written  {_setting(plan.written)}: {memory(peak)}, {verdict}"
        yield f"                {_parts(plan.written)}"
    for number, candidate in enumerate(plan.found.fitting[:best], 1):
        yield f"    {number}.  {_setting(candidate)}: {memory(candidate.memory.peak)}, {_seconds(candidate)}"
        yield f"        {' '.join(f'--set {each}' for each in candidate.overrides)}"
    if not plan.found.fitting:
        yield f"    {_nothing(plan, usable)}"


def _nothing(plan: BackendPlan, usable: float) -> str:
    smallest = plan.found.smallest
    if smallest is None:
        return "no mesh of that many devices divides this model and its global batch; change training.global_batch"
    lacking = memory(smallest.memory.peak - usable)
    return f"nothing fits: the smallest, {_setting(smallest)}, needs {memory(smallest.memory.peak)}, {lacking} too much"


def _setting(candidate: Candidate) -> str:
    setting = candidate.setting
    said = [setting.mesh]
    if setting.backend == "deepspeed":
        said.append(f"ZeRO {setting.zero_stage}")
    said.append(f"micro-batch {setting.micro_batch}" + (f" x {setting.accumulation}" if setting.accumulation > 1 else ""))
    said.append(f"remat {setting.remat if isinstance(setting.remat, str) else ', '.join(setting.remat)}")
    said.append(f"{setting.attention} attention")
    if setting.offload_optimizer != "none":
        said.append("optimiser in host memory")
    return ", ".join(said)


def _parts(candidate: Candidate) -> str:
    fullest = candidate.memory.fullest
    parts = [f"{name} {memory(size)}" for name, size in fullest.parts.items() if size >= 0.005 * fullest.total]
    return f"at {fullest.name}: {', '.join(parts)}"


def _seconds(candidate: Candidate) -> str:
    seconds = candidate.speed.seconds
    return f"{seconds:.2f} s a step" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms a step"


def _budget_lines(budget: Budget) -> Iterator[str]:
    yield f"budget on {budget.devices.chip.name}: {budget.flops:.3g} FLOPs at {budget.utilization.mfu:.1%} of peak"
    yield f"  this model: {large(budget.tokens)} tokens"
    if budget.best is None or budget.shape is None:
        return
    best, (hidden, layers) = budget.best, budget.shape
    yield (
        f"  best model: {large(best.parameters)} parameters on {large(best.tokens)} tokens; in this model's proportions "
        f"hidden size {hidden:,}, {layers} layers ({scaling.SOURCE})"
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan."""
    compute = plan.compute
    return {
        "compute": {
            "parameters": compute.parameters,
            "active_parameters": compute.active,
            "steps": compute.steps,
            "tokens": compute.tokens,
            "tokens_per_parameter": compute.ratio,
            "flops_per_token": compute.flops_per_token,
            "flops": compute.flops,
            "optimal_tokens": compute.optimal,
            "equivalent_parameters": compute.equivalent,
            "meaning": None if compute.optimal is None else scaling.meaning(compute.active, compute.tokens),
            "source": None if compute.optimal is None else scaling.SOURCE,
        },
        "devices": [_device_json(each) for each in plan.devices],
        "budgets": [_budget_json(each) for each in plan.budgets],
    }


def _device_json(plan: DevicePlan) -> dict[str, Any]:
    devices = plan.devices
    return {
        "written": devices.written,
        "chip": devices.chip.name,
        "chips": devices.chips,
        "devices": devices.count,
        "memory_bytes": devices.chip.memory_bytes,
        "usable_bytes": round(devices.usable_bytes),
        "mfu": plan.utilization.mfu,
        "mfu_source": plan.utilization.source,
        "seconds": plan.seconds,
        "chip_hours": plan.chip_hours,
        "lacking_bytes": round(plan.lacking),
        "backends": {each.backend: _backend_json(each) for each in plan.backends},
    }


def _backend_json(plan: BackendPlan) -> dict[str, Any]:
    error = isinstance(plan.written, ConfigError)
    return {
        "as_written": {"error": str(plan.written)} if error else _candidate_json(plan.written),
        "fitting": [_candidate_json(each) for each in plan.found.fitting[:20]],
        "smallest": None if plan.found.smallest is None else _candidate_json(plan.found.smallest),
    }


def _candidate_json(candidate: Any) -> dict[str, Any]:
    setting = candidate.setting
    return {
        "mesh": setting.parallel.model_dump(),
        "micro_batch": setting.micro_batch,
        "accumulation": setting.accumulation,
        "remat": setting.remat,
        "attention": setting.attention,
        "zero_stage": setting.zero_stage,
        "offload_optimizer": setting.offload_optimizer,
        "offload_param": setting.offload_param,
        "memory": candidate.memory.to_json(),
        "step_seconds": candidate.speed.seconds,
        "overrides": list(candidate.overrides),
    }


def _budget_json(budget: Budget) -> dict[str, Any]:
    return {
        "chip": budget.devices.chip.name,
        "mfu": budget.utilization.mfu,
        "flops": budget.flops,
        "tokens": budget.tokens,
        "best_parameters": None if budget.best is None else budget.best.parameters,
        "best_tokens": None if budget.best is None else budget.best.tokens,
        "best_hidden_size": None if budget.shape is None else budget.shape[0],
        "best_layers": None if budget.shape is None else budget.shape[1],
    }


def shortened(plan: Plan, limit: int = 6) -> Plan:
    """Of many kinds of devices those on which the run fits, the smallest slices of each kind, cheapest first."""
    fitting: dict[str, DevicePlan] = {}
    for each in plan.devices:
        if each.chip_hours is not None:
            fitting.setdefault(each.devices.chip.key, each)
    cheapest = sorted(fitting.values(), key=lambda each: each.chip_hours or 0.0)
    chosen = cheapest[:limit]
    budgets = [each for each in plan.budgets if any(each.devices is kept.devices for kept in chosen)]
    return Plan(plan.compute, chosen, budgets)


def nothing_fits(plan: Plan) -> str:
    """The sentence about a run that fits nowhere."""
    lacking = [(each.lacking, each) for each in plan.devices if each.lacking > 0]
    if not lacking:
        return "no mesh of these devices divides the model and its global batch; change training.global_batch or --chips"
    least, nearest = min(lacking, key=lambda pair: pair[0])
    return (
        f"no setting fits on any of the devices looked at; the nearest, {nearest.devices.written}, lacks {memory(least)} per "
        "device: use more devices, a shorter sequence or a smaller model"
    )
