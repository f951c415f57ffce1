"""Where a value of a compiled program comes from: through loops, tuples and copies back to the operation that made it."""

from __future__ import annotations

import re

from jaxllm.planning.tpu.hlo import Instruction, Module

_HANDS_ON = frozenset({"copy", "copy-start", "copy-done", "bitcast", "custom-call", "optimization-barrier"})
_DEEPEST = 64


class Origins:
    """Origins of the values of one module."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._home = {name: home for home, body in module.computations.items() for name in body}
        self._loops = {
            str(each.attribute(role)): each
            for each in module.instructions.values()
            if each.opcode == "while"
            for role in ("body", "condition")
        }

    def of(self, instruction: Instruction, index: tuple[int, ...] = ()) -> tuple[Instruction, tuple[int, ...]]:
        """The operation that made element `index` of an instruction's value, and which element of it."""
        for _ in range(_DEEPEST):
            before = self._before(instruction, index)
            if before is None:
                break
            instruction, index = before
        return instruction, index

    def _before(self, each: Instruction, index: tuple[int, ...]) -> tuple[Instruction, tuple[int, ...]] | None:
        """One step back; None where the value was made."""
        if each.opcode == "tuple" and index:
            return self._named(each.operands[index[0]]), index[1:]
        if each.opcode == "get-tuple-element":
            match = re.search(r"index=(\d+)", each.attributes)
            return None if match is None else (self._named(each.operands[0]), (int(match.group(1)), *index))
        if each.opcode == "parameter":
            loop = self._loops.get(self._home.get(each.name, ""))
            return None if loop is None else (loop, index)  # what the loop changes, the loop made
        if each.opcode == "while" and index:
            return (self._named(each.operands[0]), index) if self._carried(each, index[0]) else None
        if each.opcode in _HANDS_ON and not each.op_name and each.operands:
            return self._named(each.operands[0]), () if each.opcode == "copy-start" else index
        return None

    def _carried(self, loop: Instruction, element: int) -> bool:
        """Whether a loop hands an element of its state on as it got it."""
        root = self._module.root(str(loop.attribute("body")))
        if root.opcode != "tuple" or element >= len(root.operands):
            return False
        last = self._named(root.operands[element])
        match = re.search(r"index=(\d+)", last.attributes) if last.opcode == "get-tuple-element" else None
        return match is not None and int(match.group(1)) == element

    def _named(self, name: str) -> Instruction:
        return self._module.instructions[name]
