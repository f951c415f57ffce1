"""Level 6: some steps in one layout, the rest in another, against never switching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxllm.config.schema import Precision
from jaxllm.parity.distance import Reference
from jaxllm.parity.layouts import Layout, one_device
from jaxllm.parity.results import Measurement
from jaxllm.parity.runs import Runs
from jaxllm.parity.trajectory import checks

Pair = tuple[Layout, Layout]


def backend_pairs(precision: Precision) -> list[Pair]:
    """From each backend to the other, on one device."""
    jax, deepspeed = one_device("jax", precision), one_device("deepspeed", precision)
    return [(jax, deepspeed), (deepspeed, jax)]


def layout_pairs(precision: Precision) -> list[Pair]:
    """Changes of backend, mesh, processes and ZeRO stage at once.  fp64 has neither stages nor processes to change."""
    mesh = Layout("jax", precision, data=2, fsdp=2, tensor=2)
    if precision == "fp64":
        return [(mesh, one_device("deepspeed", precision)), (one_device("deepspeed", precision), mesh)]
    return [
        (mesh, Layout("deepspeed", precision, zero_stage=3, processes=2)),
        (Layout("deepspeed", precision, zero_stage=2, processes=2), mesh),
        (Layout("deepspeed", precision, zero_stage=2, processes=2), Layout("deepspeed", precision, zero_stage=3)),
        (mesh, Layout("jax", precision, processes=2, fsdp=4)),
    ]


def switch(runs: Runs, precision: Precision, pairs: Sequence[Pair]) -> Iterator[Measurement]:
    """Train each pair, changing over in the middle, and compare with the run that stays in the first layout."""
    for first, second in pairs:
        reference = Reference(runs.finished(first))
        step, run = runs.switched(first, second)
        comparison = reference.compare(run, "switch", after=step)
        runs.discard(run)
        yield reference.curve("switch")
        yield comparison.curve
        name = f"{first.name} to {second.name} after step {step}, against {first.name}"
        yield from checks(comparison, "switch", precision, name)
