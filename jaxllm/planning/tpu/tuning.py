"""Tuning a step for a topology by compiling it: mesh split, rematerialisation, micro-batch and kernel blocks.

Every trial is a real compilation, so the search spends them where they tell most: first meshes, with the run file's other
choices (or the most sparing ones where those do not fit); then, on the best meshes, what the backward pass keeps and how many
rows a pass takes; then the attention kernel's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxllm.config import RunConfig
from jaxllm.families import ModelSpec, Vocabulary, resolve_model, task_of
from jaxllm.planning.tpu.changes import Changes, changed, rows_per_device, sizes_of
from jaxllm.planning.tpu.remedies import REMAT_POLICIES, attempt
from jaxllm.planning.tpu.remedies import Remedy as Trial
from jaxllm.planning.tpu.study import vocabulary_of
from jaxllm.planning.tpu.topology import Topology

BEST_MESHES = 2
BLOCKS = (512, 1024, 2048)


def tune(config: RunConfig, topology: Topology, *, trials: int, report: Callable[[str], None]) -> list[Trial]:
    """Trials, the fastest first.  trials: how many compilations to spend."""
    search = _Search(config, topology, trials, report)
    vocabulary = Vocabulary(vocabulary_of(config))
    spec = resolve_model(config.model, vocabulary, weights=False, task=task_of(config.objective)).spec
    search.attempt({})
    for mesh in meshes(spec, config, topology.devices):
        search.attempt(mesh)
    if not search.fitting():
        # Nothing fits as the run file has it: the same meshes, keeping as little as can be.
        for mesh in meshes(spec, config, topology.devices):
            search.attempt({**mesh, "jax.remat": "full", "training.micro_batch": 1})
    for base in [trial.changes for trial in search.fitting()[:BEST_MESHES]]:
        for change in passes(changed(config, base), topology.devices):
            search.attempt({**base, **change})
    for base in [trial.changes for trial in search.fitting()[:1]]:
        for block in BLOCKS:
            if config.data.sequence_length % block == 0:
                search.attempt({**base, "jax.attention_block": block})
    return search.ranked()


class _Search:
    """Trials made so far, none of them twice."""

    def __init__(self, config: RunConfig, topology: Topology, trials: int, report: Callable[[str], None]) -> None:
        self._config, self._topology, self._left, self._report = config, topology, trials, report
        self._made: dict[str, Trial] = {}

    def attempt(self, changes: Changes) -> None:
        """Compile it, unless the trials are spent or it was compiled already."""
        key = changed(self._config, changes).model_dump_json(exclude={"name"})
        if self._left < 1 or key in self._made:
            return
        self._left -= 1
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
        if config.training.global_batch % rows:
            continue
        for data in (1, 2, 4):
            fsdp = rows // data
            if rows % data == 0 and spec.hidden_size % fsdp == 0:
                yield {"parallel.data": data, "parallel.fsdp": fsdp, "parallel.tensor": tensor}


def passes(config: RunConfig, devices: int) -> Iterator[dict[str, object]]:
    """What the backward pass keeps x how many rows a pass takes, larger passes first."""
    rows = rows_per_device(config, devices)
    sizes = sorted((size for size in range(1, rows + 1) if rows % size == 0), reverse=True)[:3]
    for size in sizes:
        for policy in REMAT_POLICIES:
            yield {"training.micro_batch": size, "jax.remat": policy}
