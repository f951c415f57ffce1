"""FLOPs of the matrix products in a compiled program.

The TPU compiler writes every product as a convolution, batch dimensions included: as windows that slide over padded and dilated
inputs, where many taps of a window fall outside and are not computed.  So the taps that fall inside are counted.
"""

from __future__ import annotations

import re

import numpy as np

from jaxllm.planning.tpu.hlo import Computation, Instruction, Module, arrays

_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def instruction_flops(instruction: Instruction, computation: Computation) -> int:
    """2 x the multiply-adds of a convolution or dot; 0 for anything else."""
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "dot":
        match = _CONTRACTED.search(instruction.attributes)
        left = arrays(computation[instruction.operands[0]].type)[0].dims
        contracted = [left[int(d)] for d in (match.group(1) if match else "").split(",") if d]
        return 2 * arrays(instruction.type)[0].elements * int(np.prod(contracted, dtype=np.int64))
    return 0


class MatmulFlops:
    """FLOPs of whole computations, fusions within them included; each is counted once and remembered."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._known: dict[str, int] = {}

    def of(self, computation: str) -> int:
        """FLOPs of one execution of a fused computation."""
        if computation not in self._known:
            self._known[computation] = 0  # a computation never calls itself; this only guards a damaged file
            body = self._module.computations[computation]
            self._known[computation] = sum(
                self.of(str(each.attribute("calls"))) if each.opcode == "fusion" else instruction_flops(each, body)
                for each in body.values()
            )
        return self._known[computation]


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        return 0
    left, right, out = labels.groups()
    left_dims, right_dims = (arrays(computation[name].type)[0].dims for name in instruction.operands[:2])
    out_dims = arrays(instruction.type)[0].dims
    window = _window(instruction.attributes, sum(c.isdigit() for c in out))
    taps = 1
    for axis, (size, stride, padding, left_dilation, right_dilation) in enumerate(window):
        label = str(axis)
        taps *= _taps(
            left_dims[left.index(label)], out_dims[out.index(label)], size, stride, padding, left_dilation, right_dilation
        )
    return 2 * out_dims[out.index("b")] * out_dims[out.index("f")] * right_dims[right.index("i")] * taps


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int, int]]:
    """Of every spatial axis: size, stride, low padding, dilation of the left and of the right operand."""
    match = _WINDOW.search(attributes)
    given = dict(re.findall(r"(\w+)=(\S+)", match.group(1))) if match else {}

    def numbers(key: str, default: int) -> list[int]:
        return [int(n) for n in given[key].split("x")] if key in given else [default] * axes

    padding = [int(pair.split("_")[0]) for pair in given["pad"].split("x")] if "pad" in given else [0] * axes
    columns = (numbers("size", 1), numbers("stride", 1), padding, numbers("lhs_dilate", 1), numbers("rhs_dilate", 1))
    return list(zip(*columns, strict=True))


def _taps(length: int, outputs: int, size: int, stride: int, padding: int, left_dilation: int, right_dilation: int) -> int:
    """How many (output, tap) pairs along one axis read an element of the input rather than padding or a hole."""
    total = 0
    last = (length - 1) * left_dilation
    taps = np.arange(size, dtype=np.int64) * right_dilation - padding
    rows = max(1, 4_000_000 // size)
    for start in range(0, outputs, rows):
        read = np.arange(start, min(start + rows, outputs), dtype=np.int64)[:, None] * stride + taps
        total += int(np.count_nonzero((read >= 0) & (read <= last) & (read % left_dilation == 0)))
    return total
