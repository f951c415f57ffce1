"""torch's AdamW as all torch contenders without an optimiser of their own have it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.throughput.workers.protocol import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY


def adamw(model: Any, device: str) -> torch.optim.Optimizer:
    """AdamW whose matrices decay, fused."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=device in ("cuda", "cpu"))
