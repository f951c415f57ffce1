"""A study as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxllm.planning.tpu.changes import spelled
from jaxllm.planning.tpu.prediction import Prediction
from jaxllm.planning.tpu.remedies import Remedy
from jaxllm.planning.tpu.study import Study
from jaxllm.planning.tpu.topology import Topology

GIB = 2**30


def lines(study: Study) -> Iterator[str]:
    """What `jaxllm compile` prints."""
    config, topology = study.config, study.topology
    mesh = {axis: size for axis, size in (study.mesh or {}).items() if size > 1}
    yield (
        f"{config.name}: {study.model.family}, {study.model.parameters:,} parameters, on {topology} "
        f"({_count(topology.chips, 'chip')}{'' if topology.devices == topology.chips else f', {topology.devices} devices'})"
    )
    yield "  " + ", ".join(
        [
            "mesh " + (" x ".join(f"{axis} {size}" for axis, size in mesh.items()) or "data 1") if study.mesh else "no mesh",
            f"global batch {config.training.global_batch} x {config.data.sequence_length} tokens",
            *([f"micro-batch {study.micro_batch} x {study.accumulation}"] if study.micro_batch else []),
            config.training.precision,
            f"remat {config.jax.remat if isinstance(config.jax.remat, str) else ' '.join(config.jax.remat)}",
            *([f"{study.attention} attention"] if study.attention else []),
        ]
    )
    if study.compile_seconds is not None and study.trace_seconds is not None:
        processor = "" if study.processor_seconds is None else f" ({study.processor_seconds:.0f} s of the processor)"
        yield f"  compiled in {study.compile_seconds:.1f} s, traced in {study.trace_seconds:.1f} s{processor}"
    yield ""
    yield from _memory(study)
    if study.prediction is not None:
        yield ""
        yield from _prediction(study, study.prediction)


def _memory(study: Study) -> Iterator[str]:
    per = "chip" if study.topology.generation.chip.devices_per_chip == 1 else "device"
    capacity = study.capacity_bytes / GIB
    if study.needed_bytes is None:
        yield f"does not fit: a {per} has {capacity:.2f} GiB; the compiler does not say how much the step needs"
        return
    needed = study.needed_bytes / GIB
    verdict = "fits" if study.fits else "does not fit"
    sense = f"{1 - needed / capacity:.0%} free" if study.fits else f"{needed - capacity:.2f} GiB too much"
    yield f"{verdict}: {needed:.2f} of {capacity:.2f} GiB of HBM per {per} at the peak, {sense}"
    if study.memory is not None:
        parts = study.memory.to_json()
        host = parts.pop("host")
        for name, size in parts.items():
            yield f"  {name:<14} {size / GIB:8.3f} GiB  {size / study.needed_bytes:6.1%}"
        if host:
            yield f"  in the host's memory, beside this: {host / GIB:.3f} GiB"


def _prediction(study: Study, found: Prediction) -> Iterator[str]:
    yield (
        f"predicted by the compiler's clock: {_seconds(found.step_seconds)} a step, "
        f"{found.tokens_per_second_per_chip:,.0f} tokens/s/chip, {found.mfu:.1%} MFU"
    )
    yield (
        f"  {_seconds(found.compute_seconds)} operations ({found.cycles / 1e6:,.{0 if found.cycles > 1e8 else 2}f} Mcycles), "
        f"{_seconds(found.attention_seconds)} attention kernels, "
        + (f"{_seconds(found.expert_seconds)} expert kernels, " if found.expert_seconds else "")
        + f"{_seconds(found.exposed_seconds)} waiting for communication "
        f"({_seconds(found.overlapped_seconds)} more runs beside the work)"
    )
    for title, table in (
        ("by kind of operation", found.by_kind),
        ("by part of the model", found.by_source),
        ("by phase", found.by_phase),
    ):
        yield f"  {title}: " + _shares(table, found.step_seconds)
    per_device = study.model_flops / study.topology.devices
    total = found.matmul_flops + found.kernel_flops
    yield (
        f"  FLOPs per device: {total / 1e12:,.1f} T in matrix products, {per_device / 1e12:,.1f} T of the model "
        f"({total / per_device:.2f} x)"
    )
    if found.counted is not None:
        agrees = "agree" if abs(found.counted - 1) < 0.01 else "DO NOT AGREE: trust the times less"
        yield f"  check: products counted in the program and by formula {agrees} ({found.counted - 1:+.2%})"
    for loop, said in found.assumed.items():
        yield f"  assumed of {loop}: {said}"
    if found.collectives or found.host_bytes:
        yield ""
        yield from _communication(found)


def _communication(found: Prediction) -> Iterator[str]:
    yield "communication of one step          times   received      alone    exposed"
    for row in found.collectives:
        what = f"{row.kind} over {row.axes}"
        alone, exposed = _seconds(row.seconds), _seconds(row.exposed_seconds)
        yield f"  {what:<31} {row.times:6}  {_bytes(row.received)}  {alone:>9}  {exposed:>9}"
    if found.host_bytes:
        yield f"  {'copies to and from the host':<31}         {_bytes(found.host_bytes)}"


def _shares(table: Mapping[str, float], whole: float) -> str:
    shown = [(name, seconds / whole) for name, seconds in table.items() if seconds / whole >= 0.005]
    return ", ".join(f"{name} {share:.1%}" for name, share in shown)


def _seconds(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:,.0f} us"


def _bytes(size: float) -> str:
    return f"{size / GIB:7.3f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> Iterator[str]:
    """Rows as columns of text.  columns: heading by key."""
    shown = [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(heading), *(len(cells[i]) for cells in shown), 0) for i, heading in enumerate(columns.values())]
    yield "  ".join(heading.ljust(width) for heading, width in zip(columns.values(), widths, strict=True)).rstrip()
    for cells in shown:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value}"


def remedy_lines(remedies: Sequence[Remedy], topology: Topology) -> Iterator[str]:
    """What would make the step fit."""
    yield ""
    if not any(remedy.fits for remedy in remedies):
        nearest = remedies[0].study if remedies else None
        if nearest is None or nearest.needed_bytes is None:
            yield f"no change of layout or memory makes it fit; use a larger topology than {topology}"
            return
        missing = (nearest.needed_bytes - nearest.capacity_bytes) / GIB
        changes = spelled(remedies[0].changes)
        yield f"no change makes it fit; the nearest, {changes}, still needs {missing:.2f} GiB more per chip"
        return
    yield "it fits with (compiled, fastest first):"
    yield from _trials(remedies)


def trial_lines(trials: Sequence[Remedy], topology: Topology, best: int = 8) -> Iterator[str]:
    """The best trials of a search."""
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        yield f"none of {len(trials)} trials fits on {topology}"
        return
    yield f"best of {len(trials)} trials on {topology}, by predicted speed:"
    yield from _trials(fitting[:best])


def _trials(trials: Sequence[Remedy]) -> Iterator[str]:
    rows = []
    for trial in trials:
        found = trial.study.prediction if trial.study else None
        if trial.study is None or found is None:
            continue
        needed, capacity = (trial.study.needed_bytes or 0) / GIB, trial.study.capacity_bytes / GIB
        rows.append(
            {
                "speed": f"{found.tokens_per_second_per_chip:,.0f}",
                "mfu": f"{found.mfu:.1%}",
                "memory": f"{needed:.2f} / {capacity:.2f}",
                "changes": spelled(trial.changes),
            }
        )
    heads = {"speed": "tokens/s/chip", "mfu": "MFU", "memory": "HBM GiB", "changes": "changes"}
    yield from (f"  {line}" for line in table(rows, heads))
