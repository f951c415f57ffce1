"""Tuning a step for a topology by compiling it: mesh split, rematerialisation, micro-batch and kernel blocks.

Every trial is a real compilation, so the search spends them where they tell most.  The planner, which takes no time, says which
settings should fit and in what order of speed; compiled are the best of each mesh in that order, then the next best on the
meshes that turned out fastest, then other blocks of the attention kernel for the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxllm.config import RunConfig
from jaxllm.errors import ConfigError
from jaxllm.families import Model, ModelSpec, Vocabulary, resolve_model, task_of
from jaxllm.planning.devices import Devices
from jaxllm.planning.jax_memory import jax_memory
from jaxllm.planning.search import attention_of
from jaxllm.planning.setting import setting_of
from jaxllm.planning.speed import speed
from jaxllm.planning.tpu.changes import AXES, Changes, changed, micro_batch_of, rows_per_device, sizes_of
from jaxllm.planning.tpu.remedies import REMAT_POLICIES, attempt
from jaxllm.planning.tpu.remedies import Remedy as Trial
from jaxllm.planning.tpu.study import vocabulary_of
from jaxllm.planning.tpu.topology import Topology
from jaxllm.planning.utilization import expected_utilization

BEST_MESHES = 2
BLOCKS = (512, 1024, 2048)

HOPELESS = 1.07
"""Times the memory of a device: what the planner, which may be wrong by so much, thinks needs more is not compiled."""

POINTS: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value", "attention_mixed", "attention_residual", "mlp_gate", "mlp_up"),  # no product runs twice
    ("query", "attention_residual", "mlp_gate", "mlp_up"),
    ("query", "key", "value", "attention_mixed", "attention_residual"),  # of the MLP, only its input is kept
)
"""Lists of points to keep for the backward pass that lie between `none` and `full`."""


@dataclass(frozen=True)
class Candidate:
    """Changes of a run file with what the planner makes of them.

    mesh: sizes of all axes.  rows: of a pass.  needs: bytes of a device.
    """

    changes: Changes
    mesh: tuple[int, ...]
    rows: int
    seconds: float
    needs: float


def tune(config: RunConfig, topology: Topology, *, trials: int, report: Callable[[str], None]) -> list[Trial]:
    """Trials, the fastest first.  trials: how many compilations to spend."""
    search = _Search(config, topology, trials, report)
    vocabulary = Vocabulary(vocabulary_of(config))
    model = resolve_model(config.model, vocabulary, weights=False, task=task_of(config.objective))
    ranked = candidates(model, config, topology)
    search.attempt({})
    firsts = {each.mesh: each for each in reversed(ranked)}
    for first in sorted(firsts.values(), key=lambda each: each.seconds)[: max(1, trials // 3)]:
        search.attempt(first.changes)
    for sparing in sorted(ranked, key=lambda each: (each.needs, each.seconds)):
        if search.fitting():
            break
        search.attempt(sparing.changes)
    fastest = [_mesh(changed(config, trial.changes), topology.devices) for trial in search.fitting()]
    best = list(dict.fromkeys(fastest))[:BEST_MESHES]
    blocks = [block for block in BLOCKS if config.data.sequence_length % block == 0]
    for each in ranked:
        if each.mesh in best and search.left > len(blocks):
            search.attempt(each.changes)
    for base in search.fitting()[:1]:
        for block in blocks:
            if base.study is not None and block != base.study.attention_block:
                search.attempt({**base.changes, "jax.attention_block": block})
    for each in ranked:  # with the trial that a block of the kernel's own did not take
        if each.mesh in best:
            search.attempt(each.changes)
    return search.ranked()


def candidates(model: Model, config: RunConfig, topology: Topology) -> list[Candidate]:
    """Settings that may fit, the fastest first, as far as the planner knows; all of them, if it thinks that none does."""
    chip = topology.generation.chip
    devices = Devices(chip, topology.chips, str(topology))
    use = expected_utilization(chip, model.parameters)
    attention = attention_of(config, model, "jax", devices, config.parallel.context)
    found: dict[tuple[object, ...], Candidate] = {}
    for mesh in meshes(model.spec, config, topology.devices):
        for change in passes(changed(config, mesh), topology.devices):
            wanted = changed(config, {**mesh, **change})
            try:
                setting = setting_of(wanted, "jax", topology.devices, attention)
            except ConfigError:
                continue
            needs, seconds = jax_memory(model, setting, "tpu").peak, speed(model, setting, devices, use).seconds
            changes = _different(config, {**mesh, **change}, topology.devices)
            key = _key(wanted, topology.devices)
            found.setdefault(key, Candidate(changes, _mesh(wanted, topology.devices), setting.micro_batch, seconds, needs))
    hopeful = [each for each in found.values() if each.needs <= HOPELESS * chip.memory_bytes]
    # Of those that the planner thinks equally fast, larger passes first: they gather weights less often.
    return sorted(hopeful or found.values(), key=lambda each: (round(each.seconds, 6), -each.rows, each.needs))


def _different(config: RunConfig, changes: Changes, devices: int) -> Changes:
    """Those changes that change something.  `data` is left out where it takes what the other axes leave."""
    sizes = {f"parallel.{axis}": size for axis, size in sizes_of(config, devices).items()}
    known = {**sizes, "training.micro_batch": micro_batch_of(config, devices), "jax.remat": config.jax.remat}
    kept = {key: value for key, value in changes.items() if known[key] != value}
    if config.parallel.data == -1:
        kept.pop("parallel.data", None)
    elif any(key.startswith("parallel.") for key in kept):
        kept["parallel.data"] = changes["parallel.data"]
    return kept


def _mesh(config: RunConfig, devices: int) -> tuple[int, ...]:
    return tuple(sizes_of(config, devices)[axis] for axis in AXES)


def _key(config: RunConfig, devices: int) -> tuple[object, ...]:
    """What tells one trial from another."""
    return _mesh(config, devices), micro_batch_of(config, devices), config.jax.model_dump_json()


class _Search:
    """Trials made so far, none of them twice.  left: trials to spend."""

    def __init__(self, config: RunConfig, topology: Topology, trials: int, report: Callable[[str], None]) -> None:
        self.left = trials
        self._config, self._topology, self._report = config, topology, report
        self._made: dict[tuple[object, ...], Trial] = {}

    def attempt(self, changes: Changes) -> None:
        """Compile it, unless the trials are spent or it was compiled already."""
        key = _key(changed(self._config, changes), self._topology.devices)
        if self.left < 1 or key in self._made:
            return
        self.left -= 1
        trial = attempt(self._config, self._topology, changes, self._report)
        self._made[key] = trial
        found = trial.study and trial.study.prediction
        if found:
            self._report(f"  {found.tokens_per_second_per_chip:,.0f} tokens/s/chip, {found.mfu:.1%} MFU")
        elif trial.study is not None:
            self._report("  does not fit")

    def fitting(self) -> list[Trial]:
        """Those that fit, the fastest first."""
        return [trial for trial in self.ranked() if trial.fits]

    def ranked(self) -> list[Trial]:
        """All, the fastest first."""
        return sorted(self._made.values(), key=lambda trial: -trial.speed)


def meshes(spec: ModelSpec, config: RunConfig, devices: int) -> Iterator[dict[str, object]]:
    """Splits of the devices over data, fsdp and tensor that the model and the batch allow, sharded most first."""
    others = sizes_of(config, devices)
    fixed = others["context"] * others["expert"]
    if devices % fixed:
        return
    free = devices // fixed
    for tensor in (1, 2, 4, 8):
        if free % tensor or spec.attention.kv_heads % tensor or spec.mlp.size % tensor:
            continue
        rows = free // tensor
        if config.training.global_batch % (rows * others["expert"]):
            continue
        for data in (1, 2, 4):
            fsdp = rows // data
            if rows % data == 0 and spec.hidden_size % fsdp == 0:
                yield {"parallel.data": data, "parallel.fsdp": fsdp, "parallel.tensor": tensor}


def passes(config: RunConfig, devices: int) -> Iterator[dict[str, object]]:
    """What the backward pass keeps x how many rows a pass takes, larger passes first."""
    rows = rows_per_device(config, devices)
    sizes = sorted((size for size in range(1, rows + 1) if rows % size == 0), reverse=True)
    for size in sizes:
        for policy in (*REMAT_POLICIES, *POINTS):
            yield {"training.micro_batch": size, "jax.remat": policy}
