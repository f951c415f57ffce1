"""A compiled step as a list of what it executes: operations with the compiler's own estimate of cycles, and what has none.

The compiler writes `estimated_cycles` beside every fusion it made; the sum over a step, with loops run as often as they run, is
the compiler's own clock.  Kernels (Pallas), collectives and copies to the host have no estimate: `Costs` models them.  The
schedule is played through: an asynchronous collective waits for its links, runs beside what is scheduled before its end, and
only what is left of it then keeps the core waiting (it is `exposed`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxllm.planning.tpu.communication import Collective, Communication, Schedule, Transfer
from jaxllm.planning.tpu.groups import Group, groups, mesh_axes
from jaxllm.planning.tpu.hlo import Array, Computation, Instruction, Module, arrays
from jaxllm.planning.tpu.loops import trips
from jaxllm.planning.tpu.matmul import MatmulFlops, instruction_flops
from jaxllm.planning.tpu.ragged import GRADIENT, RAGGED, is_of_experts
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
_CALLED = re.compile(r"called_computations=\{%?([\w.\-]+)")
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
    """A kernel.  name: as its author called it.  kind: what it is for.  cycles and flops: of one execution, by the model."""

    name: str
    kind: Literal["attention", "experts"]
    source: str
    phase: str
    times: int
    cycles: float
    flops: float


class Costs(Protocol):
    """A model of what the compiler does not estimate."""

    def kernel(self, op_name: str, operands: tuple[Array, ...]) -> tuple[float, float]:
        """Cycles and FLOPs of a Pallas kernel."""
        ...

    def collective(self, kind: str, members: list[Group], size: float) -> tuple[float, float]:
        """Cycles, and bytes that a device receives."""
        ...

    def transfer(self, size: float) -> float:
        """Cycles of a copy between HBM and the host."""
        ...


@dataclass
class Program:
    """What one training step executes on one device.

    assumed: what could not be read from the program, by loop.  clock: cycles from beginning to end, as the schedule was played
    through; all that is recorded must add up to it.
    """

    operations: list[Operation] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0

    @property
    def cycles(self) -> int:
        """Sum of the compiler's estimates over a step."""
        return sum(each.cycles * each.times for each in self.operations)

    @property
    def kernel_cycles(self) -> float:
        """Cycles in Pallas kernels, by the model."""
        return sum(each.cycles * each.times for each in self.kernels)

    @property
    def communication(self) -> list[Collective | Transfer]:
        """Collectives, and copies to and from the host."""
        return [*self.collectives, *self.transfers]

    @property
    def exposed_cycles(self) -> float:
        """Cycles the core waits for communication."""
        return sum(each.exposed * each.times for each in self.communication)

    @property
    def total_cycles(self) -> float:
        """Cycles of a step: the core at work, and the core waiting."""
        return self.cycles + self.kernel_cycles + self.exposed_cycles

    @property
    def matmul_flops(self) -> float:
        """FLOPs of matrix products of a step, experts' and recomputation included, attention kernels excluded."""
        products = sum(each.flops * each.times for each in self.operations)
        return products + sum(each.flops * each.times for each in self.kernels if each.kind == "experts")

    @property
    def kernel_flops(self) -> float:
        """FLOPs of attention kernels of a step."""
        return sum(each.flops * each.times for each in self.kernels if each.kind == "attention")


def read_program(module: Module, mesh: Mapping[str, int], costs: Costs) -> Program:
    """Walk a module from its entry.  mesh: sizes of the run's mesh axes, outermost first."""
    program = Program()
    program.clock = _Walk(module, mesh, costs, program).computation(module.entry, 1)
    if not math.isclose(program.clock, program.total_cycles, rel_tol=1e-6, abs_tol=1.0):
        raise RuntimeError(
            f"the schedule takes {program.clock:.0f} cycles, but its parts add up to {program.total_cycles:.0f}; "
            "jaxllm read the compiled program wrongly: please report this with the run file"
        )
    return program


class _Walk:
    def __init__(self, module: Module, mesh: Mapping[str, int], costs: Costs, program: Program) -> None:
        self._module = module
        self._mesh = mesh
        self._devices = math.prod(mesh.values())
        self._costs = costs
        self._program = program
        self._flops = MatmulFlops(module)

    def computation(self, name: str, times: int) -> float:
        """Record everything a computation executes `times` times; the cycles of one execution."""
        schedule = Schedule()
        body = self._module.computations[name]
        for each in body.values():
            if each.opcode.endswith("-done") or (each.opcode == "fusion" and "-done" in each.name):
                for operand in each.operands:
                    self._finish(schedule.wait(operand))
                if each.cycles is None:
                    continue
            busy = self._instruction(each, body, times, schedule)
            schedule.clock += busy  # not in one statement: the clock would be read before the instruction waits on it
        for left in schedule.left():
            self._finish(schedule.wait(left))
        return schedule.clock

    def _finish(self, ended: tuple[Communication, float] | None) -> None:
        if ended is None:
            return
        what, waited = ended
        done = what.finished
        if isinstance(done, Collective):
            fields = {**vars(done), "exposed": waited}
            self._program.collectives.append(Collective(**fields))
        else:
            self._program.transfers.append(Transfer(**{**vars(done), "exposed": waited}))

    def _instruction(self, each: Instruction, body: Computation, times: int, schedule: Schedule) -> float:
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
            what = self._collective(each, each, base, times)
            schedule.begin(each.name, what)
            if not each.opcode.endswith("-start"):
                self._finish(schedule.wait(each.name))
            return 0.0
        if each.opcode in ("copy-start", "async-update"):
            if each.opcode == "copy-start":
                self._copy(each, times, schedule)
            else:
                self._update(each, body, times, schedule)
            return 0.0
        if each.opcode == "custom-call":
            return self._custom_call(each, body, times)
        cycles = each.cycles
        if cycles is None and each.opcode in ("call", "async-start"):
            return self._call(each, times, schedule)
        if each.opcode == "fusion":
            self._fused_collectives(each, times, cycles, schedule)
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
            tried.append((_Walk(self._module, self._mesh, self._costs, program).computation(name, times), program))
        if not tried:
            return 0.0
        cycles, dearest = max(tried, key=lambda pair: pair[0])
        for part in ("operations", "kernels", "collectives", "transfers"):
            getattr(self._program, part).extend(getattr(dearest, part))
        self._program.assumed.update(dearest.assumed)
        return cycles

    def _call(self, each: Instruction, times: int, schedule: Schedule) -> float:
        """A called computation; one that another thread (SparseCore, a copy engine) runs keeps the core free."""
        called = each.attribute("calls") or each.attribute("to_apply")
        if called is None or called not in self._module.computations:
            return 0.0
        inner = self._module.computations[called]
        if each.opcode == "async-start" and self._collective_in(called) is not None:
            if each.operands:
                self._begin_called(each.name, each, times, schedule)
            return 0.0
        if "async_execution_thread" in each.attributes:
            self._threaded_copy(each, inner, times, schedule)
            return 0.0
        return self.computation(called, times)

    def _begin_called(self, name: str, start: Instruction, times: int, schedule: Schedule) -> None:
        """The collective that an `async-start` calls begins, under `name`."""
        collective = self._collective_in(str(start.attribute("calls")))
        if collective is not None:
            base = _BOUNDARY.sub("", collective.opcode)
            schedule.begin(name, self._collective(collective, start, base, times))

    def _update(self, each: Instruction, body: Computation, times: int, schedule: Schedule) -> None:
        """A SparseCore is started early, without operands, and gets them by an `async-update`: only then can it work."""
        start = body.get(each.operands[0]) if each.operands else None
        if start is None or schedule.rename(start.name, each.name):
            return
        if start.opcode == "async-start":
            self._begin_called(each.name, start, times, schedule)

    def _collective_in(self, computation: str) -> Instruction | None:
        """The collective that a called computation is for, however deep its calls; None if it is for something else."""
        for one in self._module.computations.get(computation, {}).values():
            if _BOUNDARY.sub("", one.opcode) in COLLECTIVES:
                return one
            deeper = _called(one)
            found = self._collective_in(deeper) if deeper else None
            if found is not None:
                return found
        return None

    def _threaded_copy(self, each: Instruction, inner: Computation, times: int, schedule: Schedule) -> None:
        """A slice of an array that moves between HBM and the host's memory beside the core's work."""
        root = next(one for one in inner.values() if one.root)
        sources = [array for name in root.operands if name in inner for array in arrays(inner[name].type)]
        targets = arrays(root.type)
        if not targets or HOST not in {array.space for array in (*sources, *targets)}:
            return
        moved = targets[0].bytes
        if root.opcode == "dynamic-update-slice":
            moved = arrays(inner[root.operands[1]].type)[0].bytes
        schedule.begin(each.name, self._transfer(moved, targets[0].space == HOST, times))

    def _copy(self, each: Instruction, times: int, schedule: Schedule) -> None:
        """copy-start: only copies between HBM and the host are of interest; others are prefetches into vector memory."""
        found = [array for array in arrays(each.type) if array.bytes > 8]
        if len(found) > 1 and HOST in {array.space for array in found[:2]}:
            schedule.begin(each.name, self._transfer(found[0].bytes, found[0].space == HOST, times))

    def _transfer(self, size: float, to_host: bool, times: int) -> Communication:
        cycles = self._costs.transfer(size)
        return Communication("host", cycles, Transfer(to_host, times, size, cycles, 0.0))

    def _collective(
        self, each: Instruction, said: Instruction, base: str, times: int, kind: str | None = None
    ) -> Communication:
        """each: the collective.  said: what names its source, which for a fused one is the fusion."""
        members = groups(each.attributes, self._devices)
        size = _payload(each, base, len(members[0]))
        cycles, received = self._costs.collective(kind or base, members, size)
        axes = mesh_axes(members, self._mesh)
        source, phase = source_of(self._module, said), phase_of(said.op_name)
        return Communication(axes, cycles, Collective(kind or base, axes, source, phase, times, size, received, cycles, 0.0))

    def _custom_call(self, each: Instruction, body: Computation, times: int) -> float:
        target = _TARGET.search(each.attributes)
        if target is None or target.group(1) != "tpu_custom_call":
            return float(each.cycles or 0)
        operands = tuple(array for name in each.operands if name in body for array in arrays(body[name].type))
        cycles, flops = self._costs.kernel(each.op_name, operands)
        scopes = [part for part in each.op_name.split("/") if part and not part.startswith(("jit(", "while", "pallas_call"))]
        name = scopes[-1] if scopes else each.name
        if is_of_experts(each.op_name):
            name, phase = (name, self._phase_of_rows(each, body)) if RAGGED in name else (GRADIENT, "backward")
            kernel = Kernel(name, "experts", "experts", phase, times, cycles, flops)
        else:
            source = source_of(self._module, each)
            kernel = Kernel(name, "attention", source, phase_of(each.op_name), times, cycles, flops)
        self._program.kernels.append(kernel)
        return cycles

    def _phase_of_rows(self, each: Instruction, body: Computation) -> str:
        """Of a kernel that the compiler has given a name of its own: that of what it reads."""
        read = (body[name] for name in each.operands if name in body)
        names = (each.op_name, *(one.op_name for one in read if one.opcode != "get-tuple-element"))
        return next((phase for name in names if (phase := phase_of(name)) != "update"), "backward")

    def _fused_collectives(self, each: Instruction, times: int, cycles: int | None, schedule: Schedule) -> None:
        """Collectives inside a fusion: a reduction whose result is cut up at once is a reduce-scatter.

        One that is fused with work runs beside that work.
        """
        inner = self._module.computations.get(str(each.attribute("calls")), {})
        for one in inner.values():
            base = _BOUNDARY.sub("", one.opcode)
            if base not in COLLECTIVES or one.opcode.endswith("-done"):
                continue
            scattered = base == "all-reduce" and any(other.opcode == "dynamic-slice" for other in inner.values())
            schedule.begin(each.name, self._collective(one, each, base, times, "reduce-scatter" if scattered else base))
            if "-start" not in each.name:
                schedule.clock += cycles or 0
                self._finish(schedule.wait(each.name))
                schedule.clock -= cycles or 0


def _called(each: Instruction) -> str | None:
    """The computation that a call, a fusion or a custom call runs."""
    if each.opcode in ("call", "fusion"):
        return each.attribute("calls") or each.attribute("to_apply")
    match = _CALLED.search(each.attributes) if each.opcode == "custom-call" else None
    return match.group(1) if match else None


def _payload(each: Instruction, base: str, members: int) -> float:
    """Bytes of the whole array: what a gather yields, what a reduction takes in, what is sent."""
    sizes = [array.bytes for array in arrays(each.type)]
    if each.opcode.endswith("-start"):
        return max(sizes, default=0.0)  # the type holds operands and results: the larger is the whole
    return sum(sizes) * (members if base == "reduce-scatter" else 1)
