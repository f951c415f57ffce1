"""How often a loop of a compiled program runs.

TPU programs do not say so: it follows from the loop's condition (`counter < bound`), the step its body adds to the counter and
the counter's first value.  Two traps: a windowed einsum counts by two, and a scan of 32 layers may be a loop of 31 with one
layer peeled off, so that a layer count is no substitute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.planning.tpu.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_FORWARDS = frozenset({"copy", "bitcast", "convert", "reshape"})
_DEEPEST = 8


@dataclass(frozen=True)
class Trips:
    """How often a loop's body runs.  assumed: what could not be read from the program and was taken to be the usual value."""

    count: int
    assumed: str | None = None


def trips(module: Module, computation: Computation, loop: Instruction) -> Trips:
    """Trip count of a `while` of `computation`."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return Trips(int(known.group(1)))
    condition, body = (module.computations[str(loop.attribute(name))] for name in ("condition", "body"))
    compared = _comparison(module, condition)
    if compared is None:
        return Trips(1, "its condition compares nothing: taken to run once")
    index, bound, direction = compared
    step = _step(module, body, index)
    first = _first(computation, loop, index)
    missing = [said for value, said in ((step, "step 1"), (first, "first value 0")) if value is None]
    span = abs(bound - (first or 0)) + (1 if direction in ("LE", "GE") else 0)
    return Trips(max(1, -(-span // abs(step or 1))), " and ".join(missing) or None)


def _comparison(module: Module, condition: Computation) -> tuple[int, int, str] | None:
    """Which element of the loop's state is compared with which constant, and how."""
    root = next(each for each in condition.values() if each.root)
    inner, given = condition, None
    if root.opcode == "fusion":
        inner = module.computations[str(root.attribute("calls"))]
        given = root.operands
        root = next((each for each in inner.values() if each.opcode == "compare"), root)
    if root.opcode != "compare":
        return None
    index = bound = None
    for name in root.operands:
        scope, inside = condition, name
        if given is not None:
            operand = inner[name]
            if operand.opcode == "parameter":
                inside = given[int(operand.arguments)]
            else:
                scope = inner
        constant = _constant(scope, inside)
        if constant is not None:
            bound = constant
        else:
            index = _element(scope, inside)
    direction = re.search(r"direction=(\w+)", root.attributes)
    if index is None or bound is None or direction is None:
        return None
    return index, bound, direction.group(1)


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What the body adds to element `index` of the loop's state."""
    root = next(each for each in body.values() if each.root)
    if root.opcode != "tuple":
        return None
    operands = root.operands
    new = body.get(operands[index]) if index < len(operands) else None
    for _ in range(_DEEPEST):
        if new is None or new.opcode not in _FORWARDS:
            break
        new = body.get(new.operands[0])
    if new is None:
        return None
    if new.opcode == "add":
        return _first_constant([(body, name) for name in new.operands])
    if new.opcode == "fusion":
        inner = module.computations[str(new.attribute("calls"))]
        root = next(each for each in inner.values() if each.root)
        if root.opcode == "add":
            given = new.operands
            sources = [
                (body, given[int(inner[name].arguments)]) if inner[name].opcode == "parameter" else (inner, name)
                for name in root.operands
            ]
            return _first_constant(sources)
    return None


def _first(computation: Computation, loop: Instruction, index: int) -> int | None:
    """Element `index` of what the loop starts with."""
    state = computation.get(loop.operands[0])
    return _constant(computation, state.operands[index]) if state is not None and state.opcode == "tuple" else None


def _first_constant(sources: Sequence[tuple[Computation, str]]) -> int | None:
    return next((value for scope, name in sources if (value := _constant(scope, name)) is not None), None)


def _constant(computation: Computation, name: str) -> int | None:
    for _ in range(_DEEPEST):
        found = computation.get(name)
        if found is None:
            return None
        if found.opcode == "constant":
            match = re.match(r"\s*(-?\d+)", found.arguments)
            return int(match.group(1)) if match else None
        if found.opcode not in _FORWARDS:
            return None
        name = found.operands[0]
    return None


def _element(computation: Computation, name: str) -> int | None:
    for _ in range(_DEEPEST):
        found = computation.get(name)
        if found is None:
            return None
        if found.opcode == "get-tuple-element":
            match = re.search(r"index=(\d+)", found.attributes)
            return int(match.group(1)) if match else None
        if found.opcode not in _FORWARDS:
            return None
        name = found.operands[0]
    return None
