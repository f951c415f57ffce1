"""Reading a compiled TPU program: the HLO text that the compiler writes after code generation.

Only what cost and memory need is kept of an instruction.  Two traps of the text: a Pallas kernel prints its metadata over
several lines, of which one begins with `}`; and layouts (`{1,0:T(8,128)S(1)}`) hold parentheses and commas of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

ITEM_BYTES: Mapping[str, float] = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1,
    "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_STARTS_LINE = re.compile(r"\s+(?:ROOT )?%[\w.\-]+ = ")
_OPCODE = re.compile(r"([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """One array of a type: its element type, dimensions, and memory space (0 is HBM, 1 vector memory, 5 the host)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.dims:
            count *= size
        return count

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return self.elements * ITEM_BYTES.get(self.dtype, 0)


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type, a tuple's in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_text):
        space = _SPACE.search(layout or "")
        found.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space.group(1)) if space else 0))
    return found


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation.  type: text of its result's type.  arguments: text between its parentheses.  attributes: what follows."""

    name: str
    opcode: str
    type: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions it reads."""
        return _OPERAND.findall(self.arguments)

    @property
    def cycles(self) -> int | None:
        """What the compiler estimates this operation to take, where it does."""
        match = _CYCLES.search(self.attributes)
        return int(match.group(1)) if match else None

    @property
    def op_name(self) -> str:
        """JAX's name stack of the operation, e.g. `jit(step)/jvp()/while/body/dot_general`."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""

    @property
    def frame(self) -> int | None:
        """Its entry in the module's table of stack frames."""
        match = _FRAME.search(self.attributes)
        return int(match.group(1)) if match else None

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a name, for example `calls` or `body`."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else None


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Frame:
    """A place in the Python source: file, function, and the frame that called it."""

    file: str
    function: str
    parent: int


@dataclass
class Module:
    """A compiled program: computations by name, in the order of their schedule, and the Python frames they came from."""

    entry: str
    computations: dict[str, Computation]
    frames: Mapping[int, Frame] = field(default_factory=dict)
    _roots: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def instructions(self) -> dict[str, Instruction]:
        """Every instruction by name (names are unique in a module)."""
        return {name: each for computation in self.computations.values() for name, each in computation.items()}

    def root(self, computation: str) -> Instruction:
        """The instruction whose value a computation returns."""
        if computation not in self._roots:
            self._roots[computation] = next(each for each in self.computations[computation].values() if each.root)
        return self._roots[computation]

    def stack(self, frame: int | None) -> Iterator[Frame]:
        """The Python frames of an operation, innermost first."""
        seen: set[int] = set()
        while frame is not None and frame in self.frames and frame not in seen:
            seen.add(frame)
            yield self.frames[frame]
            frame = self.frames[frame].parent


def parse(text: str) -> Module:
    """Read a module.  ValueError when it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry: str | None = None
    current: Computation | None = None
    lines = list(_logical_lines(text))
    for line in lines:
        if current is None:
            if _opens(line):
                is_entry = line.startswith("ENTRY")
                name = line.split()[1 if is_entry else 0].lstrip("%")
                current = computations[name] = {}
                entry = name if is_entry else entry
        elif _closes(line):
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is not a compiled HLO module")
    return Module(entry, computations, _frames(text))


def _opens(line: str) -> bool:
    return bool(line) and not line[0].isspace() and line.rstrip().endswith("{") and "->" in line


def _closes(line: str) -> bool:
    return line == "}" or line.startswith("}, execution_thread")


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, with those that continue an instruction joined to it."""
    pending: str | None = None
    for line in text.splitlines():
        fresh = _STARTS_LINE.match(line) or _closes(line) or (line[:1] in ("%", "E", "H") and "->" in line) or not line.strip()
        if fresh or pending is None:
            if pending is not None:
                yield pending
            pending = line
        else:
            pending += line
    if pending is not None:
        yield pending


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    type_text, rest = _split_type(match.group(3))
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    end = _closing(rest, len(opcode.group(1)))
    return Instruction(
        match.group(2), opcode.group(1), type_text, rest[opcode.end() : end], rest[end + 1 :], bool(match.group(1))
    )


def _split_type(text: str) -> tuple[str, str]:
    """`TYPE op(...)` -> TYPE and `op(...)`."""
    if text.startswith("("):
        end = _closing(text, 0)
        return text[: end + 1], text[end + 2 :]
    space = text.find(" ")
    return text[:space], text[space + 1 :]


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the first one at or after `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text)


def _frames(text: str) -> dict[int, Frame]:
    """The tables FileNames, FunctionNames, FileLocations and StackFrames at the head of the text."""
    head = text[: text.find("\n%")] if "\n%" in text else text
    files = {int(i): name for i, name in re.findall(r'^(\d+) "([^"]*)"$', _section(head, "FileNames"), re.MULTILINE)}
    functions = {int(i): name for i, name in re.findall(r'^(\d+) "([^"]*)"$', _section(head, "FunctionNames"), re.MULTILINE)}
    places = {
        int(i): (files.get(int(file), ""), functions.get(int(function), ""))
        for i, file, function in re.findall(
            r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)", _section(head, "FileLocations"), re.MULTILINE
        )
    }
    frames = re.findall(
        r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _section(head, "StackFrames"), re.MULTILINE
    )
    # The text counts parents from 1 for the root and shifts the others by one, so that 0 can mean none.
    return {int(i): Frame(*places.get(int(place), ("", "")), int(parent or 0) - 1) for i, place, parent in frames}


def _section(head: str, title: str) -> str:
    match = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", head, re.MULTILINE | re.DOTALL)
    return match.group(1) if match else ""
