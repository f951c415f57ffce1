"""Memory of real DeepSpeed processes: every allocation that torch's profiler sees."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from benchmarks.planner.cases import Case


def measure_process(case: Case) -> float:
    """Peak bytes of live allocations over some steps of this process, one of the case's.

    Frees on gloo's threads go unreported, so that the step counts in which that distorts the sum least: what it is thought to
    leave behind differs least from what is really there.
    """
    from torch.profiler import ProfilerActivity, profile

    from jaxllm.backend import Hyper
    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model, task_of
    from jaxllm.run import Run
    from jaxllm.torch_backend import DeepSpeedBackend

    config = RunConfig.model_validate(case.config())
    run = Run(config, resolve_model(config.model, task=task_of(config.objective)), 1)
    backend = DeepSpeedBackend()
    batch = random_batch(case, run, backend.shard.index)
    backend.start(run, None)
    measured = []
    for step in range(4):
        before = resident()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            backend.step(batch, Hyper(1e-3, 1.0 - 0.9 ** (step + 1), 1.0 - 0.95 ** (step + 1)))
        rises = list(_rises(found))
        measured.append((abs(rises[-1] - (resident() - before)), before + max(rises)))
    return float(min(measured[1:])[1])


def random_batch(case: Case, run: Any, seed: int) -> Any:
    """One process's rows of a global batch: random tokens, or labels, none of them padding."""
    import numpy as np

    from jaxllm.data.batch import Batch

    rows, length = case.batch // case.devices, case.target or case.sequence
    drawn = np.random.default_rng(seed)

    def tokens(columns: int, below: int = case.model["vocab_size"]) -> Any:
        return drawn.integers(0, below, (rows, columns)).astype(np.int32)

    def ones(columns: int) -> Any:
        return np.ones((rows, columns), np.int32)

    head = run.model.spec.head
    columns = 1 if head.kind == "sequence-classification" else length
    targets = tokens(columns, head.outputs or case.model["vocab_size"])
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    source = {} if case.target is None else {"source": tokens(case.sequence), "source_segments": ones(case.sequence)}
    return Batch(tokens(length), targets, ones(columns).astype(np.float32), positions, ones(length), **source)


def resident() -> int:
    """Bytes of all tensors that are alive, storages that they share counted once."""
    import torch

    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _rises(found: Any) -> Iterator[int]:
    """Bytes more than at the beginning, after each allocation and free that the profiler has seen."""

    def visit(nodes: Any) -> Iterator[tuple[int, int, int]]:
        for node in nodes:
            if node.tag.name == "Allocation":
                yield node.start_time_ns, node.typed[1].alloc_size, node.typed[1].ptr
            yield from visit(node.children)

    alive: dict[int, int] = {}
    total = 0
    events = sorted(visit(found.profiler.kineto_results.experimental_event_tree()), key=lambda event: event[0])
    for _, size, address in events:
        if size > 0:
            total += size - alive.get(address, 0)  # an address that is handed out again was freed, unreported
            alive[address] = size
        else:
            total -= alive.pop(address, -size)
        yield total
