"""How long the attention kernel takes: its FLOPs over the rate that such kernels reach.

The compiler gives no estimate for a Pallas kernel.  Splash attention computes whole blocks of scores and skips those that the
causal mask or the window hides: the FLOPs counted are those of the blocks it computes, two matrix products forward
(scores, weighted values), and for the gradients three (query) and four (key and value), or five in one kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxllm.planning.tpu.hlo import Array

ATTENTION_EFFICIENCY = 0.6
"""Share of the matrix units' peak that the kernel reaches on the blocks it computes.  With it the predictions meet published
runs (docs/tpu_compile.md); softmax keeps the vector units busy for the rest."""

_PHASES = (("dkv", 4), ("dq", 3), ("fwd", 2))  # kernel's name, matrix products of one block
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")


@dataclass(frozen=True)
class AttentionShape:
    """What the run says of its attention.

    windows: of every layer.  blocks: (query, key) sizes of the forward and of the backward kernels.
    """

    length: int
    causal: bool
    windows: tuple[int | None, ...]
    forward_blocks: tuple[int, int]
    backward_blocks: tuple[int, int]
    fused: bool

    def computed_fraction(self, blocks: tuple[int, int]) -> float:
        """Share of the square of scores in the blocks that are not skipped, on average over the layers."""
        shares = {window: self._fraction(blocks, window) for window in set(self.windows)}
        return sum(shares[window] for window in self.windows) / len(self.windows)

    def _fraction(self, blocks: tuple[int, int], window: int | None) -> float:
        rows, columns = (min(size, self.length) for size in blocks)
        computed = 0
        for query in range(0, self.length, rows):
            for key in range(0, self.length, columns):
                last_query, last_key = query + rows - 1, key + columns - 1
                if self.causal and key > last_query:
                    continue
                if window is not None and query - last_key >= window:
                    continue
                if window is not None and not self.causal and key - last_query >= window:
                    continue
                computed += 1
        return computed * rows * columns / self.length**2


def kernel_flops(op_name: str, operands: tuple[Array, ...], shape: AttentionShape | None) -> float:
    """FLOPs of one call of an attention kernel; 0 for a kernel that is not known."""
    match = _SPLASH.search(op_name)
    if match is None or shape is None:
        return 0.0
    phase = match.group(1)
    products = 5 if phase == "dkv" and shape.fused else dict(_PHASES)[phase]
    # The query is the largest operand in a floating-point type of at most 4 bytes: (..., S, D), heads and rows before.
    queries = [array for array in operands if array.dtype in ("bf16", "f32") and len(array.dims) >= 3]
    if not queries:
        return 0.0
    query = max((array for array in queries if array.dims[-2] == shape.length), key=lambda array: array.elements, default=None)
    if query is None:
        return 0.0
    blocks = shape.forward_blocks if phase == "fwd" else shape.backward_blocks
    return 2.0 * products * query.elements * shape.length * shape.computed_fraction(blocks)
