"""Step time, tokens/s and MFU of a compiled step, by the compiler's clock and models of what it leaves out.

step = estimated cycles of all operations + attention kernels (by FLOPs) + what collectives and host copies keep the core
waiting for (by bytes and links), over the clock.  Input, checkpoints and stragglers are not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxllm.planning.tpu.groups import Group
from jaxllm.planning.tpu.hlo import Array
from jaxllm.planning.tpu.kernels import ATTENTION_EFFICIENCY, STEP_SECONDS, AttentionShape, kernel_work
from jaxllm.planning.tpu.links import Links, wire_bytes
from jaxllm.planning.tpu.program import Program
from jaxllm.planning.tpu.ragged import RAGGED, RAGGED_EFFICIENCY, gradient_flops, is_of_experts, ragged_flops
from jaxllm.planning.tpu.topology import Topology

HOST_BYTES_PER_SECOND = 16e9
"""Rate between a chip's HBM and its host's memory: the chip's share of the host's PCIe lanes."""


class TpuCosts:
    """`Costs` of a topology.

    places: of the mesh's devices, in its row-major order.  spread: devices that experts are spread over.
    """

    def __init__(
        self, topology: Topology, places: Sequence[Sequence[int]], attention: AttentionShape | None, spread: int = 1
    ) -> None:
        self._spread = spread
        self._generation = topology.generation
        self._links = Links(topology, places)
        self._attention = attention

    def kernel(self, op_name: str, operands: tuple[Array, ...]) -> tuple[float, float]:
        """Cycles and FLOPs of an attention or expert kernel at the share of the peak that such kernels reach."""
        if is_of_experts(op_name):
            flops = (ragged_flops if RAGGED in op_name else gradient_flops)(operands, self._spread)
            return flops / (self._generation.chip.bf16_flops * RAGGED_EFFICIENCY) * self._generation.clock_hz, flops
        work = kernel_work(op_name, operands, self._attention)
        seconds = work.flops / (self._generation.chip.bf16_flops * ATTENTION_EFFICIENCY)
        seconds += work.steps * STEP_SECONDS / self._generation.cores
        return seconds * self._generation.clock_hz, work.flops

    def collective(self, kind: str, members: list[Group], size: float) -> tuple[float, float]:
        """Cycles of a collective with the links to itself, and bytes that a device receives."""
        seconds = self._links.seconds(kind, members, size)
        return seconds * self._generation.clock_hz, wire_bytes(kind, max(map(len, members)), size)

    def transfer(self, size: float) -> float:
        """Cycles of a copy between HBM and the host."""
        return size / HOST_BYTES_PER_SECOND * self._generation.clock_hz


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives of one kind over the same axes, in one step.  received: bytes of one device."""

    axes: str
    kind: str
    times: int
    received: float
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True)
class Prediction:
    """One step by the compiler's clock.  Tables are of seconds: by kind of operation, by part of the model, by phase."""

    step_seconds: float
    compute_seconds: float
    attention_seconds: float
    expert_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    cycles: int
    tokens_per_second_per_chip: float
    mfu: float
    by_kind: Mapping[str, float]
    by_source: Mapping[str, float]
    by_phase: Mapping[str, float]
    collectives: tuple[CollectiveRow, ...]
    host_bytes: float
    matmul_flops: float
    kernel_flops: float
    expected_matmul_flops: float | None
    assumed: Mapping[str, str]

    @property
    def counted(self) -> float | None:
        """Matmul FLOPs counted in the program over those the model's formula gives: 1 when every loop was read rightly."""
        return self.matmul_flops / self.expected_matmul_flops if self.expected_matmul_flops else None

    def to_json(self) -> dict[str, object]:
        """For a report."""
        return {**asdict(self), "counted": self.counted}


def predict(
    program: Program, topology: Topology, tokens: int, model_flops: float, expected_matmul_flops: float | None
) -> Prediction:
    """The prediction for a step of `tokens` tokens over all chips.

    model_flops: of the whole step, as MFU counts them.  expected_matmul_flops: of one device's matrix products outside
    kernels, by formula, where it is known.
    """
    generation = topology.generation
    clock = generation.clock_hz
    seconds = program.total_cycles / clock
    by_kind = _table(program.operations, lambda each: each.kind, clock)
    kernels = {kind: _cycles_in(program, kind) / clock for kind in ("attention", "experts")}
    by_kind["attention kernels"] = kernels["attention"]
    if kernels["experts"]:
        by_kind["expert kernels"] = kernels["experts"]
    by_kind["exposed communication"] = program.exposed_cycles / clock
    parts = [*program.operations, *program.kernels]
    return Prediction(
        step_seconds=seconds,
        compute_seconds=program.cycles / clock,
        attention_seconds=kernels["attention"],
        expert_seconds=kernels["experts"],
        exposed_seconds=program.exposed_cycles / clock,
        overlapped_seconds=sum(max(each.cycles - each.exposed, 0.0) * each.times for each in program.communication) / clock,
        cycles=program.cycles,
        tokens_per_second_per_chip=tokens / seconds / topology.chips,
        mfu=model_flops / seconds / (generation.chip.bf16_flops * topology.devices),
        by_kind=_sorted(by_kind),
        by_source=_sorted(_table(parts, lambda each: each.source, clock)),
        by_phase=_sorted(_table(parts, lambda each: each.phase, clock)),
        collectives=_collectives(program, clock),
        host_bytes=sum(each.size * each.times for each in program.transfers),
        matmul_flops=program.matmul_flops,
        kernel_flops=program.kernel_flops,
        expected_matmul_flops=expected_matmul_flops,
        assumed=dict(program.assumed),
    )


def _cycles_in(program: Program, kind: str) -> float:
    return sum(each.cycles * each.times for each in program.kernels if each.kind == kind)


def _table(parts: Sequence[Any], key: Callable[[Any], str], clock: float) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for each in parts:
        found[key(each)] += each.cycles * each.times / clock
    return dict(found)


def _sorted(table: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(table.items(), key=lambda pair: -pair[1]))


def _collectives(program: Program, clock: float) -> tuple[CollectiveRow, ...]:
    groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for each in program.collectives:
        row = groups[each.axes, each.kind]
        for i, value in enumerate((1.0, each.received, each.cycles / clock, each.exposed / clock)):
            row[i] += value * each.times
    rows = [CollectiveRow(axes, kind, int(row[0]), *row[1:]) for (axes, kind), row in groups.items()]
    return tuple(sorted(rows, key=lambda row: -row.received))
