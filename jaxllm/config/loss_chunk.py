"""How many tokens' logits exist at once (`training.loss_chunk`): one rule for both backends and for the planner."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

LossChunk: TypeAlias = Literal["auto", "none"] | Annotated[int, Field(ge=1)]

AUTO_TOKENS = 1024
"""Tokens of a chunk that `auto` takes: enough that the products stay as fast as on all tokens (docs/performance.md)."""

AUTO_LOGITS = 1 << 23
"""Logits below which `auto` takes all tokens at once: what they need is small beside the rest of a training step."""


def chunk_tokens(wanted: LossChunk, tokens: int, vocabulary: int, *, tpu: bool = False) -> int | None:
    """Tokens of a chunk, all chunks but the last being alike; None: the logits of all tokens exist at once.

    tokens: of one device's forward pass.  vocabulary: entries whose logits one device computes.  tpu: where `auto` takes all
    tokens, since the TPU compiler (libtpu 0.0.52) fails on chunks within a loop over micro-batches when fsdp is above 1.
    """
    if wanted == "none" or (tpu and wanted == "auto") or (wanted == "auto" and tokens * vocabulary <= AUTO_LOGITS):
        return None
    size = AUTO_TOKENS if wanted == "auto" else wanted
    if tokens <= size:
        return None
    chunks = -(-tokens // size)
    return -(-tokens // chunks)
