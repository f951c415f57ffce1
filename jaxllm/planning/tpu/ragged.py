"""The kernel that the TPU compiler makes of `jax.lax.ragged_dot`: rows times the weights of the expert that each goes to.

It carries no estimate.  Rows (A, K) meet weights (X, K, N), either of which may be transposed; rows behind the last group,
which are of experts on other devices, are skipped.  Only products whose contracted dimension is not the ragged one become this
kernel: the gradient of the weights is a plain product of all rows with all experts, with zeros for other experts' rows.
"""

from __future__ import annotations

from jaxllm.planning.tpu.hlo import Array

RAGGED = "ragged-dot"
"""What the compiler calls it."""

RAGGED_EFFICIENCY = 0.6
"""Share of the matrix units' peak that the kernel is taken to reach, as of attention kernels: an assumption."""


def ragged_flops(operands: tuple[Array, ...], spread: int) -> float:
    """FLOPs of one call when all experts get as many rows; 0 where it only counts them.  spread: devices that share experts."""
    floating = [array for array in operands if array.dtype in ("bf16", "f32")]
    rows = next((array for array in floating if len(array.dims) == 2), None)
    weights = next((array for array in floating if len(array.dims) == 3), None)
    if rows is None or weights is None:
        return 0.0
    return 2.0 * rows.dims[0] * weights.dims[1] * weights.dims[2] / spread
