"""The matrix products that a step's program must hold, by formula: a check that its loops were read rightly.

Of one device, kernels apart.  Every layer's products run forward once and backward twice; what the rematerialisation policy
does not keep runs forward again, except the layer's last product, whose result the backward pass does not need.
"""

from __future__ import annotations

from jaxllm.families.spec import ModelSpec
from jaxllm.metrics.flops import BACKWARD, flops_per_token


def expected_matmul_flops(
    model: ModelSpec, length: int, tokens: int, ways: int, remat: object, attention_in_kernel: bool
) -> float | None:
    """FLOPs of one device's products of a step.  tokens: of the global batch.  ways: devices that share the work.

    None where the policy keeps things by name, of which the formula knows nothing.
    """
    parts = flops_per_token(model, length)
    # The model's own count halves attention for the causal mask; products written out compute the whole square.
    attention = 0.0 if attention_in_kernel else parts.attention * (2.0 if model.attention.causal else 1.0)
    matrices = 3 if model.mlp.gated else 2
    last = parts.mlp / matrices
    recomputed = {
        "none": 0.0,
        "full": parts.projections + attention + parts.mlp - last,
        "dots": attention,
        "offload": attention,  # queries, keys, values, residuals and the MLP's inner products are kept
    }.get(str(remat))
    if recomputed is None:
        return None
    forward = parts.projections + attention + parts.mlp + parts.head
    return ((1.0 + BACKWARD) * forward + recomputed) * tokens / ways
