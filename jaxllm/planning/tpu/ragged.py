"""Kernels of experts: what the TPU compiler makes of `jax.lax.ragged_dot`, and the Pallas kernel for the weights' gradient.

They carry no estimate.  In the compiler's kernel, rows (A, K) meet the weights (X, K, N) of the expert that each goes to, which
may be transposed.  In the other, rows (A, K) meet gradients (A, N), expert by expert.  Rows behind the last group, which are of
experts on other devices, are skipped.  Where `jaxllm.jax_backend.model.grouped` does not take the second one, the gradient is a
plain product of all rows with all experts, with zeros for other experts' rows.
"""

from __future__ import annotations

from jaxllm.planning.tpu.hlo import Array

RAGGED = "ragged-dot"
"""What the compiler calls its kernel."""

GRADIENT = "tgmm"
"""What JAX calls the one for the gradient of weights."""

RAGGED_EFFICIENCY = 0.6
"""Share of the matrix units' peak that the kernels are taken to reach, as of attention kernels: an assumption."""


def ragged_flops(operands: tuple[Array, ...], spread: int) -> float:
    """FLOPs of one call when all experts get as many rows; 0 where it only counts them.  spread: devices that share experts."""
    floating = [array for array in operands if array.dtype in ("bf16", "f32")]
    rows = next((array for array in floating if len(array.dims) == 2), None)
    weights = next((array for array in floating if len(array.dims) == 3), None)
    if rows is None or weights is None:
        return 0.0
    return 2.0 * rows.dims[0] * weights.dims[1] * weights.dims[2] / spread


def gradient_flops(operands: tuple[Array, ...], spread: int) -> float:
    """The same of one call of the kernel for the gradient of weights."""
    matrices = [array for array in operands if array.dtype in ("bf16", "f32") and len(array.dims) == 2]
    if len(matrices) != 2:
        return 0.0
    rows, gradient = matrices
    return 2.0 * rows.dims[0] * rows.dims[1] * gradient.dims[1] / spread


def is_of_experts(op_name: str) -> bool:
    """Whether a kernel of that name is one of the two."""
    return RAGGED in op_name or f"jit({GRADIENT})" in op_name
