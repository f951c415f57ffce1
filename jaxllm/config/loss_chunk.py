"""How many tokens' logits exist at once (`training.loss_chunk`): one rule for both backends and for the planner."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

LossChunk: TypeAlias = Literal["auto", "none"] | Annotated[int, Field(ge=1)]

AUTO_TOKENS = 1024
"""Tokens of a chunk that `auto` takes: enough that the products stay as fast as on all tokens (docs/performance.md)."""

AUTO_TOKENS_TPU = 2048
"""The same on a TPU, whose products are fast enough that adding up the head's gradient is felt with smaller chunks."""

AUTO_LOGITS = 1 << 23
"""Logits below which `auto` takes all tokens at once: what they need is small beside the rest of a training step."""


def chunk_tokens(wanted: LossChunk, tokens: int, vocabulary: int, *, hidden: int = 0, tpu: bool = False) -> int | None:
    """Tokens of a chunk, all chunks but the last being alike; None: the logits of all tokens exist at once.

    tokens: of one device's forward pass.  vocabulary: entries whose logits one device computes.  tpu: where `auto` compares
    with the hidden size, because logits in bf16 and their gradient take as much memory for that many tokens as the head's
    gradient, which chunks add up in float32.
    """
    if wanted == "none":
        return None
    if wanted == "auto" and (tokens * vocabulary <= AUTO_LOGITS or (tpu and tokens < hidden + AUTO_TOKENS_TPU)):
        return None
    size = wanted if wanted != "auto" else AUTO_TOKENS_TPU if tpu else AUTO_TOKENS
    if tokens <= size:
        return None
    chunks = -(-tokens // size)
    return -(-tokens // chunks)
