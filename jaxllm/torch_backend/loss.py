"""Losses of tokens and of rows.  B sequences, T targets of a row, L outputs (of a language model: the vocabulary)."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from jaxllm.families.spec import LossKind


def weighted_loss(kind: LossKind, logits_BTL: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weight * loss of one kind, from logits in float32 (float64 stays float64).

    cross-entropy: logits (B, T, L) against labels (B, T), in nats.  binary-cross-entropy: logits (B, 1, L) against zeros and
    ones (B, L).  squared-error: outputs (B, 1, L) against values (B, L).
    """
    logits = logits_BTL.to(torch.promote_types(logits_BTL.dtype, torch.float32))
    if kind == "cross-entropy":
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.to(losses.dtype).flatten()).sum()
    compare = mse_loss if kind == "squared-error" else binary_cross_entropy_with_logits
    losses = compare(logits[:, 0], targets.to(logits.dtype), reduction="none")
    return (losses * weights.to(losses.dtype)).sum()
