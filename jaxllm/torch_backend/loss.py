"""The token-weighted cross-entropy.  B sequences, S tokens, V vocabulary entries."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def weighted_loss(logits_BSV: torch.Tensor, targets_BS: torch.Tensor, weights_BS: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of weight * cross-entropy, in nats, from logits in float32 (float64 stays float64)."""
    logits = logits_BSV.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(logits, targets_BS.flatten(), reduction="none")
    return (losses * weights_BS.to(losses.dtype).flatten()).sum()
