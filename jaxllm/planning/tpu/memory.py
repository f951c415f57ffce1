"""How the memory of one device divides at the step's fullest moment.

The compiler writes which buffer every value has, and when each value is alive.  At the moment when most memory is in use, every
byte of the program's working memory belongs to a value, and the value to one of five kinds:

| kind | values |
|---|---|
| parameters, moments | arguments of the step, which it keeps updated in place |
| gradients | of the shape of a parameter (whole, one layer, or a shard of either), made by the backward pass or after it |
| activations | made by the forward pass, or recomputed for the backward pass |
| temporaries | all else: copies of weights in the compute dtype, gathered weights, what the backward pass works on, gaps |
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from jaxllm.planning.tpu.hlo import Instruction, Module, arrays
from jaxllm.planning.tpu.origins import Origins
from jaxllm.planning.tpu.program import HOST
from jaxllm.planning.tpu.source import phase_of

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)((?:\{[\d,]*\})?)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)")
_RANGE = re.compile(r"^\s+([\w.\-]+)(\{[\d,]*\}):(\d+)-(\d+)$")
_KINDS = ("gradients", "activations", "temporaries")  # a byte that several values share belongs to the first of these


@dataclass(frozen=True)
class MemoryDivision:
    """Bytes of one device's HBM at the peak.  other: batch, scalars, constants.  host: bytes kept in the host's memory."""

    parameters: int
    moments: int
    gradients: int
    activations: int
    temporaries: int
    other: int
    host: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.parameters + self.moments + self.gradients + self.activations + self.temporaries + self.other

    def to_json(self) -> dict[str, int]:
        """For a report."""
        return asdict(self)


@dataclass(frozen=True)
class _Value:
    """A value in a buffer of the working memory."""

    name: str
    index: str
    allocation: int
    offset: int
    size: int


def divide(
    module: Module, assignment: str, live_ranges: str, parameter_shards: Mapping[str, Sequence[Sequence[int]]], peak: int
) -> MemoryDivision:
    """The division of `peak` bytes.

    module: the program after buffer assignment.  assignment, live_ranges: the compiler's files of those names.
    parameter_shards: of every parameter its whole and its shard's shape.
    """
    arguments = _arguments(module)
    at_peak = _at_peak(_working_values(assignment), _live(live_ranges))
    shapes, origins = _gradient_shapes(parameter_shards), Origins(module)
    found = _sum_by_kind((value, _kind(module, origins, value, shapes)) for value in at_peak)
    known = arguments["parameters"] + arguments["moments"] + arguments["other"]
    working = max(peak - known, 0)
    gradients, activations = found["gradients"], found["activations"]
    rest = max(working - gradients - activations, 0)
    host = arguments["host"] + _buffer_bytes(assignment, on_host=True)
    return MemoryDivision(arguments["parameters"], arguments["moments"], gradients, activations, rest, arguments["other"], host)


def peak_bytes(assignment: str, analysis: Mapping[str, int]) -> int:
    """Peak HBM of one device.  analysis: XLA's own numbers of the program.

    XLA's peak looks at the fullest of all memories, which is the host's when a program keeps more there than it works with in
    HBM.  Of a program that keeps anything there it is all of the buffers in HBM, with the gaps between their values.
    """
    if not _buffer_bytes(assignment, on_host=True):
        return analysis["peak_memory"]
    return analysis["argument_size"] + _buffer_bytes(assignment, on_host=False)


def _buffer_bytes(assignment: str, *, on_host: bool) -> int:
    """Of working memory in HBM or in the host's memory."""
    found = (_ALLOCATION.match(line) for line in assignment.splitlines())
    colour = f", color {HOST}, preallocated-temp:" if on_host else ", preallocated-temp:"
    return sum(int(opened.group(2)) for opened in found if opened and opened.group(3) == colour)


def _arguments(module: Module) -> dict[str, int]:
    """Bytes of the entry's parameters by what JAX calls them."""
    found = dict.fromkeys(("parameters", "moments", "other", "host"), 0)
    for each in module.computations[module.entry].values():
        if each.opcode != "parameter":
            continue
        name = each.op_name
        kind = "parameters" if name.startswith("params") else "moments" if name.startswith("moments") else "other"
        for array in arrays(each.type):
            found["host" if array.space == HOST else kind] += int(array.bytes)
    return found


def _working_values(assignment: str) -> list[_Value]:
    """Values in HBM buffers that are neither arguments nor constants."""
    values: list[_Value] = []
    allocation: int | None = None
    for line in assignment.splitlines():
        opened = _ALLOCATION.match(line)
        if opened:
            said = opened.group(3)
            working = not any(word in said for word in ("color", "parameter", "constant", "thread-local"))
            allocation = int(opened.group(1)) if working else None
            continue
        match = _VALUE.match(line) if allocation is not None else None
        if match and allocation is not None:
            name, index, size, offset = match.groups()
            values.append(_Value(name, index or "{}", allocation, int(offset), int(size)))
    return values


def _live(live_ranges: str) -> dict[tuple[str, str], tuple[int, int]]:
    """From when to when every value is alive, in steps of the schedule."""
    return {
        (match.group(1), match.group(2)): (int(match.group(3)), int(match.group(4)))
        for line in live_ranges.splitlines()
        if (match := _RANGE.match(line))
    }


def _at_peak(values: Sequence[_Value], live: Mapping[tuple[str, str], tuple[int, int]]) -> list[_Value]:
    """The values alive at the moment when they take most memory together."""
    ranged = [(value, live[value.name, value.index]) for value in values if (value.name, value.index) in live]
    events: dict[int, int] = defaultdict(int)
    seen: dict[tuple[int, int, int, int], None] = {}
    for value, (start, end) in ranged:
        key = (value.allocation, value.offset, start, end)
        if key not in seen:  # values that share a buffer for the same time count once
            seen[key] = None
            events[start] += value.size
            events[end + 1] -= value.size
    fullest, moment, total = 0, 0, 0
    for time in sorted(events):
        total += events[time]
        if total > fullest:
            fullest, moment = total, time
    return [value for value, (start, end) in ranged if start <= moment <= end]


def _sum_by_kind(values: Iterable[tuple[_Value, str]]) -> dict[str, int]:
    """Bytes by kind, each byte of a buffer once."""
    found = dict.fromkeys(_KINDS, 0)
    covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for value, kind in sorted(values, key=lambda pair: _KINDS.index(pair[1])):
        free = [(value.offset, value.offset + value.size)]
        for start, end in covered[value.allocation]:
            free = [
                piece for low, high in free for piece in ((low, min(high, start)), (max(low, end), high)) if piece[0] < piece[1]
            ]
        found[kind] += sum(high - low for low, high in free)
        covered[value.allocation].extend(free)
    return found


def _gradient_shapes(parameter_shards: Mapping[str, Sequence[Sequence[int]]]) -> set[tuple[int, ...]]:
    """Shapes that a gradient may have, without dimensions of one: a vector's is no sign of anything, so only of matrices."""
    shapes = set()
    for path, (whole, shard) in parameter_shards.items():
        for shape in (whole, shard):
            shapes.add(_squeezed(shape))
            if "layers" in path.split("."):
                shapes.add(_squeezed(shape[1:]))
    return {shape for shape in shapes if len(shape) > 1}


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _kind(module: Module, origins: Origins, value: _Value, gradients: set[tuple[int, ...]]) -> str:
    instruction = module.instructions.get(value.name)
    if instruction is None:
        return "temporaries"
    index = tuple(int(n) for n in value.index.strip("{}").split(",") if n)
    shape = _shape(instruction, index)
    instruction, _ = origins.of(instruction, index)
    phase = phase_of(instruction.op_name)
    if shape in gradients:
        return "gradients" if phase == "backward" or (phase == "update" and _is_gradient(instruction)) else "temporaries"
    if instruction.op_name.startswith(("params", "moments")):
        return "temporaries"
    return "activations" if phase in ("forward", "recompute") else "temporaries"


def _is_gradient(instruction: Instruction) -> bool:
    """After the backward pass: reductions over devices and what scales them; not the casts of parameters before it."""
    name = instruction.op_name
    return bool(name) and not name.startswith(("params", "moments", "batch")) and "convert_element_type" not in name


def _shape(instruction: Instruction, index: tuple[int, ...]) -> tuple[int, ...] | None:
    found = arrays(instruction.type)
    if not instruction.type.startswith("("):
        return _squeezed(found[0].dims) if found else None
    return _squeezed(found[index[0]].dims) if len(index) == 1 and index[0] < len(found) else None
