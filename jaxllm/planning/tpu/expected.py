"""The matrix products that a step's program must hold, by formula: a check that its loops were read rightly.

Of one device, kernels apart.  Every layer's products run forward once and backward twice; those whose result the
rematerialisation policy does not keep run forward again, except the layer's last product, whose result the backward pass does
not need.
"""

from __future__ import annotations

from collections.abc import Collection

from jaxllm.config.remat import RematPolicy, kept_points
from jaxllm.families.spec import HeadSpec, ModelSpec
from jaxllm.metrics.flops import BACKWARD, flops_per_token


def expected_matmul_flops(
    model: ModelSpec, length: int, tokens: int, ways: int, remat: RematPolicy | tuple[str, ...], attention_in_kernel: bool
) -> float | None:
    """FLOPs of one device's products of a step.  tokens: of the global batch.  ways: devices that share the work.

    None where the formula does not know: a head with products of its own, experts, and points kept by name with attention
    written out, of whose products what runs again depends on both.
    """
    if model.head != HeadSpec() or model.mlp.experts is not None:
        return None
    parts = flops_per_token(model, length)
    # The model's own count halves attention for the causal mask; products written out compute the whole square.
    attention = 0.0 if attention_in_kernel else parts.attention * (2.0 if model.attention.causal else 1.0)
    forward = parts.projections + attention + parts.mlp + parts.head
    kept = kept_points(remat)
    if kept is not None:
        if not attention_in_kernel:
            return None
        recomputed = recomputed_flops(model, {*kept.device, *kept.host})
    else:
        every = recomputed_flops(model, ()) + attention
        recomputed = {"none": 0.0, "dots": attention, "full": every}[str(remat)]
    return ((1.0 + BACKWARD) * forward + recomputed) * tokens / ways


def recomputed_flops(model: ModelSpec, kept: Collection[str]) -> float:
    """FLOPs per token of the layers' products that run again when the points of `kept` are kept."""
    spec, hidden = model.attention, model.hidden_size
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    products = {
        ("query",): hidden * query,
        ("key",): hidden * key,
        ("value",): hidden * key,
        ("attention_output", "attention_residual"): query * hidden,
        ("mlp_up",): hidden * model.mlp.size,
        ("mlp_gate",): hidden * model.mlp.size if model.mlp.gated else 0,
    }
    return 2.0 * model.layers * sum(size for points, size in products.items() if not set(points) & set(kept))
