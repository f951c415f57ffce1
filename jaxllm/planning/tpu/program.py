"""A compiled step as a list of what it executes: operations with the compiler's own estimate of cycles, and what has none.

The compiler writes `estimated_cycles` beside every fusion it made; the sum over a step, with loops run as often as they run, is
the compiler's own clock.  Kernels (Pallas), collectives and copies to the host have no estimate: they are listed with what a
model of them needs, collectives together with the cycles of the work that the schedule puts between their start and end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxllm.planning.tpu.groups import Group, groups, mesh_axes
from jaxllm.planning.tpu.hlo import Array, Computation, Instruction, Module, arrays
from jaxllm.planning.tpu.loops import trips
from jaxllm.planning.tpu.matmul import MatmulFlops, instruction_flops
from jaxllm.planning.tpu.source import phase_of, source_of

Kind = Literal["matmul", "fusion", "copy"]

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
HOST = 5
"""Memory space of the host's memory in a layout."""

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BOUNDARY = re.compile(r"-(start|done|update)$")


@dataclass(frozen=True)
class Operation:
    """An operation with an estimate.  cycles and flops (of matrix products): of one execution.  times: executions in a step."""

    name: str
    kind: Kind
    source: str
    phase: str
    times: int
    cycles: int
    flops: int


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel.  name: as its author called it.  operands: shapes of what it reads."""

    name: str
    source: str
    phase: str
    times: int
    cycles: float
    operands: tuple[Array, ...]


@dataclass(frozen=True)
class Collective:
    """A collective.  bytes: of the whole array (gathered, reduced, or sent).  covered: cycles of work scheduled beside it.

    asynchronous: whether the schedule starts it before it waits for it.
    """

    kind: str
    axes: str
    members: tuple[Group, ...]
    source: str
    phase: str
    times: int
    bytes: float
    asynchronous: bool
    covered: float


@dataclass(frozen=True)
class Transfer:
    """A copy between HBM and the host's memory.  covered: cycles of work scheduled beside it."""

    to_host: bool
    times: int
    bytes: float
    covered: float


@dataclass
class Program:
    """What one training step executes on one device.  assumed: what could not be read from the program, by loop."""

    operations: list[Operation] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)

    @property
    def cycles(self) -> int:
        """Sum of the compiler's estimates over a step."""
        return sum(each.cycles * each.times for each in self.operations)

    @property
    def matmul_flops(self) -> int:
        """FLOPs of matrix products of a step, recomputation included, kernels excluded."""
        return sum(each.flops * each.times for each in self.operations)


KernelCycles = Callable[[str, tuple[Array, ...]], float]


def read_program(module: Module, mesh: Mapping[str, int], kernel_cycles: KernelCycles) -> Program:
    """Walk a module from its entry.

    mesh: sizes of the run's mesh axes, outermost first.  kernel_cycles: a model of a kernel's cycles by its name and operands.
    """
    program = Program()
    _Walk(module, mesh, kernel_cycles, program).computation(module.entry, 1)
    return program


@dataclass
class _Open:
    """Something asynchronous that has begun: where the clock stood, and how to record it once it ends."""

    began: float
    record: Callable[[float], None]


class _Walk:
    def __init__(self, module: Module, mesh: Mapping[str, int], kernel_cycles: KernelCycles, program: Program) -> None:
        self._module = module
        self._mesh = mesh
        self._devices = 1
        for size in mesh.values():
            self._devices *= size
        self._kernel_cycles = kernel_cycles
        self._program = program
        self._flops = MatmulFlops(module)

    def computation(self, name: str, times: int) -> float:
        """Record everything a computation executes `times` times; the cycles of one execution."""
        clock = 0.0
        begun: dict[str, _Open] = {}
        body = self._module.computations[name]
        for each in body.values():
            if each.opcode.endswith("-done"):
                opened = begun.pop(each.operands[0], None) if each.operands else None
                if opened is not None:
                    opened.record(clock - opened.began)
                continue
            clock += self._instruction(each, body, times, clock, begun)
        for opened in begun.values():
            opened.record(clock - opened.began)
        return clock

    def _instruction(self, each: Instruction, body: Computation, times: int, clock: float, begun: dict[str, _Open]) -> float:
        """Record one instruction; the cycles it keeps the core busy for."""
        if each.opcode == "while":
            found = trips(self._module, body, each)
            if found.assumed:
                self._program.assumed[each.name] = found.assumed
            return found.count * self.computation(str(each.attribute("body")), times * found.count)
        if each.opcode == "conditional":
            return self._conditional(each, times)
        base = _BOUNDARY.sub("", each.opcode)
        if base in COLLECTIVES:
            self._collective(each, base, times, clock, begun)
            return 0.0
        if each.opcode == "copy-start":
            self._copy(each, times, clock, begun)
            return 0.0
        if each.opcode == "custom-call":
            return self._custom_call(each, body, times)
        cycles = each.cycles
        if cycles is None and each.opcode in ("call", "async-start"):
            return self._call(each, times, clock, begun)
        if each.opcode == "fusion":
            self._fused_collectives(each, times, cycles or 0, clock, begun)
        if cycles is None:
            return 0.0
        self._operation(each, body, times, cycles)
        return float(cycles)

    def _operation(self, each: Instruction, body: Computation, times: int, cycles: int) -> None:
        flops = instruction_flops(each, body)
        if each.opcode == "fusion":
            flops = self._flops.of(str(each.attribute("calls")))
        kind: Kind = "matmul" if flops else ("copy" if each.name.startswith("copy") or each.opcode == "copy" else "fusion")
        self._program.operations.append(
            Operation(each.name, kind, source_of(self._module, each), phase_of(each.op_name), times, cycles, flops)
        )

    def _conditional(self, each: Instruction, times: int) -> float:
        """The dearest branch."""
        listed = _BRANCHES.search(each.attributes)
        names = [name.strip().lstrip("%") for name in listed.group(1).split(",")] if listed else []
        names += [name for key in ("true_computation", "false_computation") if (name := each.attribute(key))]
        tried = []
        for name in names:
            program = Program()
            walk = _Walk(self._module, self._mesh, self._kernel_cycles, program)
            tried.append((walk.computation(name, times), program))
        if not tried:
            return 0.0
        cycles, dearest = max(tried, key=lambda pair: pair[0])
        for name in ("operations", "kernels", "collectives", "transfers"):
            getattr(self._program, name).extend(getattr(dearest, name))
        self._program.assumed.update(dearest.assumed)
        return cycles

    def _call(self, each: Instruction, times: int, clock: float, begun: dict[str, _Open]) -> float:
        """A called computation; one that another thread (SparseCore, or a copy engine) runs keeps the core free."""
        called = each.attribute("calls") or each.attribute("to_apply")
        if called is None or called not in self._module.computations:
            return 0.0
        inner = self._module.computations[called]
        collective = next((c for c in inner.values() if _BOUNDARY.sub("", c.opcode) in COLLECTIVES), None)
        if each.opcode == "async-start" and collective is not None:
            base = _BOUNDARY.sub("", collective.opcode)
            begun[each.name] = _Open(clock, self._recorder(collective, base, times, asynchronous=True))
            return 0.0
        if "async_execution_thread" in each.attributes:
            self._threaded_copy(each, inner, times, clock, begun)
            return 0.0
        return self.computation(called, times)

    def _threaded_copy(self, each: Instruction, inner: Computation, times: int, clock: float, begun: dict[str, _Open]) -> None:
        """A slice of an array that moves between HBM and the host's memory beside the core's work."""
        root = next(one for one in inner.values() if one.root)
        sources = [array for name in root.operands if name in inner for array in arrays(inner[name].type)]
        targets = arrays(root.type)
        spaces = {array.space for array in (*sources, *targets)}
        if HOST not in spaces or not targets:
            return
        moved = targets[0].bytes
        if root.opcode == "dynamic-update-slice":
            moved = arrays(inner[root.operands[1]].type)[0].bytes
        to_host = targets[0].space == HOST
        record = lambda covered: self._program.transfers.append(Transfer(to_host, times, moved, covered))  # noqa: E731
        begun[each.name] = _Open(clock, record)

    def _collective(self, each: Instruction, base: str, times: int, clock: float, begun: dict[str, _Open]) -> None:
        if each.opcode.endswith("-start"):
            begun[each.name] = _Open(clock, self._recorder(each, base, times, asynchronous=True))
        else:
            self._recorder(each, base, times, asynchronous=False)(0.0)

    def _recorder(
        self, each: Instruction, base: str, times: int, *, asynchronous: bool, moved: float | None = None
    ) -> Callable[[float], None]:
        members = tuple(groups(each.attributes, self._devices))
        if moved is None:
            moved = self._payload(each, base, len(members[0]))

        def record(covered: float) -> None:
            self._program.collectives.append(
                Collective(
                    base,
                    mesh_axes(members, self._mesh),
                    members,
                    source_of(self._module, each),
                    phase_of(each.op_name),
                    times,
                    moved,
                    asynchronous,
                    covered,
                )
            )

        return record

    @staticmethod
    def _payload(each: Instruction, base: str, members: int) -> float:
        """Bytes of the whole array: what a gather yields, what a reduction takes in, what is sent."""
        sizes = [array.bytes for array in arrays(each.type)]
        if each.opcode.endswith("-start"):
            # The type is (operands, results, ...): the larger half counts once.
            return max(sizes, default=0.0)
        return sum(sizes) * (members if base == "reduce-scatter" else 1)

    def _copy(self, each: Instruction, times: int, clock: float, begun: dict[str, _Open]) -> None:
        """copy-start: only copies between HBM and the host are of interest; others are prefetches into vector memory."""
        found = [array for array in arrays(each.type) if array.bytes > 8]
        if len(found) < 2 or HOST not in {array.space for array in found[:2]}:
            return
        moved, to_host = found[0].bytes, found[0].space == HOST
        record = lambda covered: self._program.transfers.append(Transfer(to_host, times, moved, covered))  # noqa: E731
        begun[each.name] = _Open(clock, record)

    def _custom_call(self, each: Instruction, body: Computation, times: int) -> float:
        target = _TARGET.search(each.attributes)
        if target is None or target.group(1) != "tpu_custom_call":
            return float(each.cycles or 0)
        operands = tuple(array for name in each.operands if name in body for array in arrays(body[name].type))
        name = each.op_name.rsplit("/", 1)[-1] or each.name
        cycles = self._kernel_cycles(each.op_name, operands)
        self._program.kernels.append(
            Kernel(name, source_of(self._module, each), phase_of(each.op_name), times, cycles, operands)
        )
        return cycles

    def _fused_collectives(self, each: Instruction, times: int, cycles: int, clock: float, begun: dict[str, _Open]) -> None:
        """Collectives inside a fusion: a reduction whose result is cut up at once is a reduce-scatter."""
        inner = self._module.computations.get(str(each.attribute("calls")), {})
        for one in inner.values():
            base = _BOUNDARY.sub("", one.opcode)
            if base not in COLLECTIVES or one.opcode.endswith("-done"):
                continue
            members = tuple(groups(one.attributes, self._devices))
            moved = self._payload(one, base, len(members[0]))
            scattered = base == "all-reduce" and any(other.opcode == "dynamic-slice" for other in inner.values())
            record = self._recorder(one, "reduce-scatter" if scattered else base, times, asynchronous=bool(cycles), moved=moved)
            if "start" in each.name and not cycles:
                begun[each.name] = _Open(clock, record)
            else:
                record(float(cycles))
