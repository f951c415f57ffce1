"""The matrix products that a step's program must hold, by formula: a check that its loops were read rightly.

Of one device, attention kernels apart.  Every layer's products run forward once and backward twice; those whose result the
rematerialisation policy does not keep run forward again, except a layer's last product where the backward pass does not need
its result: it does where a norm or the weights of experts come after it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jaxllm.config.remat import RematPolicy, kept_points
from jaxllm.families.spec import ModelSpec
from jaxllm.metrics.flops import BACKWARD, flops_per_token


@dataclass(frozen=True)
class Rows:
    """The rows of a step.  length: tokens of each; target: of an encoder-decoder's target, `length` being its source's."""

    count: int
    length: int
    target: int | None = None

    def tokens(self, model: ModelSpec) -> int:
        """Of a row, as FLOPs per token count them."""
        return self.length + (0 if model.encoder is None else self.target or self.length)


def expected_matmul_flops(
    model: ModelSpec,
    rows: Rows,
    ways: int,
    remat: RematPolicy | tuple[str, ...],
    attention_in_kernel: bool,
    tensor: int = 1,
    *,
    expert_kernel: bool = False,
) -> float | None:
    """FLOPs of one device's products of a step.  ways: devices that share the work; tensor: those of them that split layers.

    expert_kernel: whether a kernel computes the gradients of experts' weights (`ragged`), each from its own rows.

    None where the formula does not know: points kept by name with attention written out, or with experts or an encoder, of
    whose products what runs again depends on more than the names.
    """
    parts, tokens = flops_per_token(model, rows.length, rows.target), rows.tokens(model)
    attention = 0.0 if attention_in_kernel else _squares(model, rows)
    layers = tokens * (parts.projections + parts.mlp)
    kept = kept_points(remat)
    if kept is not None:
        if not attention_in_kernel or model.mlp.experts is not None or model.encoder is not None:
            return None
        again = tokens * recomputed_flops(model, {*kept.device, *kept.host})
    elif remat == "dots":
        # Its policy knows plain products; those of experts are of another kind.
        again = attention + (0.0 if model.mlp.experts is None else tokens * _experts(model))
    else:
        again = 0.0 if remat == "none" else layers + attention - (0.0 if _needs_last(model) else tokens * _last(model, rows))
    again += tokens * ((0.0 if expert_kernel else _unneeded(model)) + _repeated(model, tensor))
    return ((1.0 + BACKWARD) * (layers + attention + tokens * parts.head) + again) * rows.count / ways


def _squares(model: ModelSpec, rows: Rows) -> float:
    """Of a row, attention written out: every score is computed, also those that a mask hides."""
    spec = model.attention
    each = 4.0 * spec.heads * spec.head_dim
    if model.encoder is None:
        return model.layers * each * rows.length**2
    source, target = rows.length, rows.target or rows.length
    return each * (len(model.encoder.attentions) * source**2 + model.layers * (target**2 + target * source))


def _experts(model: ModelSpec) -> float:
    """Per token, the products of experts without their router's."""
    chosen = 1 if model.mlp.experts is None else model.mlp.experts.per_token
    return 2.0 * model.layers * 3 * model.hidden_size * model.mlp.size * chosen


def _unneeded(model: ModelSpec) -> float:
    """Per token, what the gradients of experts' weights multiply by zero without a kernel: every row meets every expert."""
    return 0.0 if model.mlp.experts is None else _experts(model) * (model.mlp.experts.count - 1)


def _repeated(model: ModelSpec, tensor: int) -> float:
    """Per token, the dense layer of a masked language model's head, which every device of `tensor` computes for itself.

    Forward, and the gradient of what it reads; that of its weights is shared.
    """
    if model.head.kind != "masked-lm" or model.head.dense is None:
        return 0.0
    return 2 * 2.0 * model.hidden_size**2 * (tensor - 1)


def _needs_last(model: ModelSpec) -> bool:
    """Whether the backward pass needs what a layer's last product gives."""
    return model.norm.after or model.norm.of_residual or model.mlp.experts is not None


def _last(model: ModelSpec, rows: Rows) -> float:
    """Per token, the last product of every layer; tokens pass through the layers of one stack only."""
    each = 2.0 * model.hidden_size * model.mlp.size
    if model.encoder is None:
        return model.layers * each
    source, target = rows.length, rows.target or rows.length
    return each * (len(model.encoder.attentions) * source + model.layers * target) / (source + target)


def recomputed_flops(model: ModelSpec, kept: Collection[str]) -> float:
    """FLOPs per token of the layers' products that run again when the points of `kept` are kept."""
    spec, hidden = model.attention, model.hidden_size
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    # What makes a product unnecessary: its result, or, where no norm reads that result alone, the residual stream behind it.
    behind = ("attention_output",) if model.norm.after else ("attention_output", "attention_residual")
    products = {
        ("query",): hidden * query,
        ("key",): hidden * key,
        ("value",): hidden * key,
        behind: query * hidden,
        ("mlp_up",): hidden * model.mlp.size,
        ("mlp_gate",): hidden * model.mlp.size if model.mlp.gated else 0,
        ("mlp_output",): hidden * model.mlp.size if _needs_last(model) else 0,
    }
    return 2.0 * model.layers * sum(size for points, size in products.items() if not set(points) & set(kept))
