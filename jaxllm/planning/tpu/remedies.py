"""A step that does not fit: the cheapest changes that make it fit, found by compiling them.

Changes are tried from the cheapest to the dearest in time: more of the parameters sharded, less kept for the backward pass,
smaller micro-batches, the optimiser's state in the host's memory.  Each is tried alone first; if none is enough they are added
up in that order, and what turns out not to be needed is taken away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.errors import JaxllmError
from jaxllm.planning.tpu.changes import Changes, changed, micro_batch_of, rows_per_device, sizes_of, spelled
from jaxllm.planning.tpu.study import Study, study
from jaxllm.planning.tpu.topology import Topology

REMAT_POLICIES = ("none", "dots", "offload", "full")
"""From those that keep most of a layer for its backward pass to those that keep least."""

WANTED = 3
"""Remedies to find before the search ends."""


@dataclass(frozen=True)
class Remedy:
    """Changes, and the step compiled with them.  study: None when the run file with them is refused."""

    changes: Changes
    study: Study | None

    @property
    def fits(self) -> bool:
        """Whether the changed step fits."""
        return self.study is not None and self.study.fits

    @property
    def speed(self) -> float:
        """Predicted tokens/s/chip; 0 when it does not fit."""
        found = None if self.study is None else self.study.prediction
        return 0.0 if found is None else found.tokens_per_second_per_chip

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return {"changes": dict(self.changes), "fits": self.fits, "study": None if self.study is None else self.study.to_json()}


def find_remedies(config: RunConfig, topology: Topology, *, report: Callable[[str], None]) -> list[Remedy]:
    """Remedies that fit, the fastest first; if none does, the one that comes nearest.  report: told of every trial."""
    singles = list(single_changes(config, topology.devices))
    tried = [attempt(config, topology, change, report) for change in singles]
    fitting = [remedy for remedy in tried if remedy.fits]
    if not fitting:
        fitting, nearest = _added_up(config, topology, singles, report)
        tried += nearest
    if fitting:
        return sorted(fitting, key=lambda remedy: -remedy.speed)[:WANTED]
    known = [remedy for remedy in tried if remedy.study is not None and remedy.study.needed_bytes is not None]
    return sorted(known, key=lambda remedy: (remedy.study and remedy.study.needed_bytes) or 0)[:1]


def attempt(config: RunConfig, topology: Topology, changes: Changes, report: Callable[[str], None]) -> Remedy:
    """Compile the run file with some changes."""
    report(f"compiling {spelled(changes)}")
    try:
        return Remedy(changes, study(changed(config, changes), topology))
    except JaxllmError as error:
        report(f"  cannot be: {error}")
        return Remedy(changes, None)


def single_changes(config: RunConfig, devices: int) -> Iterator[dict[str, object]]:
    """One change at a time, the cheapest first."""
    sizes = sizes_of(config, devices)
    if sizes["data"] > 1:
        yield {"parallel.data": 1, "parallel.fsdp": sizes["fsdp"] * sizes["data"]}
    if config.jax.remat in ("none", "dots"):
        yield {"jax.remat": "full"}
    if config.jax.remat != "offload":
        yield {"jax.remat": "offload"}
    micro, rows = micro_batch_of(config, devices), rows_per_device(config, devices)
    smaller = [size for size in range(1, micro) if rows % size == 0]
    if smaller:
        yield {"training.micro_batch": max(smaller)}
        if min(smaller) != max(smaller):
            yield {"training.micro_batch": min(smaller)}
    offload = config.jax.offload_optimizer
    if offload == "none":
        yield {"jax.offload_optimizer": "moments"}
    if offload != "all":
        yield {"jax.offload_optimizer": "all"}


def _added_up(
    config: RunConfig, topology: Topology, singles: list[dict[str, object]], report: Callable[[str], None]
) -> tuple[list[Remedy], list[Remedy]]:
    """All changes up to the first sum that fits, without those that it can do without; and what was tried and did not fit."""
    together: dict[str, object] = {}
    failed: list[Remedy] = []
    # Offloaded activations would take the place of not keeping them, which needs less still.
    added = [change for change in singles if change != {"jax.remat": "offload"}]
    for number, change in enumerate(added):
        together = {**together, **change}
        if number == 0:
            continue  # tried alone already
        remedy = attempt(config, topology, together, report)
        if remedy.fits:
            return [_without_needless(config, topology, remedy, report)], failed
        failed.append(remedy)
    return [], failed


def _without_needless(config: RunConfig, topology: Topology, remedy: Remedy, report: Callable[[str], None]) -> Remedy:
    best = remedy
    for section in dict.fromkeys(key.split(".")[0] for key in remedy.changes):
        fewer = {key: value for key, value in best.changes.items() if not key.startswith(f"{section}.")}
        if fewer and len(fewer) < len(best.changes):
            trial = attempt(config, topology, fewer, report)
            best = trial if trial.fits else best
    return best
