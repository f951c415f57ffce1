"""How long the attention kernel takes: its FLOPs over the rate that such kernels reach.

The compiler gives no estimate for a Pallas kernel.  Splash attention computes whole blocks of scores and skips those that the
causal mask or the window hides: the FLOPs counted are those of the blocks it computes, two matrix products forward
(scores, weighted values), and for the gradients three (query) and four (key and value), or five in one kernel.  Every step of
the kernel's grid costs a little beside that, which is why larger blocks are faster until they compute too much that is hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxllm.planning.tpu.hlo import Array

ATTENTION_EFFICIENCY = 0.6
"""Share of the matrix units' peak that the kernel reaches on the blocks it computes.  With it the predictions meet published
runs (docs/tpu_compile.md); softmax keeps the vector units busy for the rest."""

STEP_SECONDS = 0.35e-6
"""What a step of a kernel's grid costs beside its work, also a step over a hidden block (JAX's guide to Pallas on TPU)."""

_PHASES = (("dkv", 4), ("dq", 3), ("fwd", 2))  # kernel's name, matrix products of one block
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")


@dataclass(frozen=True)
class AttentionShape:
    """What the run says of its attention.

    windows: of every layer.  blocks: (query, key) sizes of the forward and of the backward kernels.  ring: devices that share
    the tokens of a row; each has its own tokens in one kernel, and in others chunks of half as many, which meet whole.
    """

    length: int
    causal: bool
    windows: tuple[int | None, ...]
    forward_blocks: tuple[int, int]
    backward_blocks: tuple[int, int]
    fused: bool
    ring: int = 1

    @property
    def at_home(self) -> int:
        """Tokens of a row that one device has."""
        return self.length // self.ring

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that the kernels have."""
        return (self.at_home,) if self.ring == 1 else (self.at_home, self.at_home // 2)

    def computed_fraction(self, blocks: tuple[int, int], length: int | None = None) -> float:
        """Share of the square of scores in the blocks that are not skipped, on average over the layers.

        length: of the kernel's `lengths`; None: the tokens at home.
        """
        if length not in (None, self.at_home):
            return 1.0
        shares = {window: self._fraction(blocks, window) for window in set(self.windows)}
        return sum(shares[window] for window in self.windows) / len(self.windows)

    def _fraction(self, blocks: tuple[int, int], window: int | None) -> float:
        rows, columns = (min(size, self.at_home) for size in blocks)
        computed = 0
        for query in range(0, self.at_home, rows):
            for key in range(0, self.at_home, columns):
                last_query, last_key = query + rows - 1, key + columns - 1
                if self.causal and key > last_query:
                    continue
                if window is not None and query - last_key >= window:
                    continue
                if window is not None and not self.causal and key - last_query >= window:
                    continue
                computed += 1
        return computed * rows * columns / self.at_home**2


@dataclass(frozen=True)
class KernelWork:
    """What one call of a kernel does: FLOPs, and steps of its grid over all heads and rows."""

    flops: float
    steps: float


def kernel_work(op_name: str, operands: tuple[Array, ...], shape: AttentionShape | None) -> KernelWork:
    """The work of one call of an attention kernel; none for a kernel that is not known."""
    match = _SPLASH.search(op_name)
    if match is None or shape is None:
        return KernelWork(0.0, 0.0)
    phase = match.group(1)
    products = 5 if phase == "dkv" and shape.fused else dict(_PHASES)[phase]
    # The query is the largest floating-point operand of the row's length: (..., S, D), rows and heads before.
    floats = [array for array in operands if array.dtype in ("bf16", "f32") and len(array.dims) > 1]
    fitting = [array for array in floats if array.dims[-2] in shape.lengths]
    query = max(fitting, key=lambda array: array.elements, default=None)
    if query is None:
        return KernelWork(0.0, 0.0)
    length = query.dims[-2]
    rows, columns = (min(size, length) for size in (shape.forward_blocks if phase == "fwd" else shape.backward_blocks))
    heads = query.elements / (length * query.dims[-1])
    flops = 2.0 * products * query.elements * length * shape.computed_fraction((rows, columns), length)
    return KernelWork(flops, heads * length**2 / (rows * columns))
