"""What is trained: models, sequences, batches and precisions of the two suites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks._models import llama_sizes

_LLAMA: dict[str, Any] = {
    "family": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        **_LLAMA,
        **llama_sizes(hidden, inner, layers, heads, kv_heads, vocabulary),
        "max_position_embeddings": 8192,
        **more,
    }


@dataclass(frozen=True)
class Case:
    """One model, trained in one way.

    rows: of a batch, all in one forward pass.  compared, warmup, blocks, block_steps: as in `protocol.Request`.  jax, torch:
    what jaxllm's run file sets for this size on either backend, and `checkpoint`, whether layers are computed again.
    """

    name: str
    model: dict[str, Any]
    sequence: int
    rows: int
    precision: str
    compared: int = 3
    warmup: int = 1
    blocks: int = 4
    block_steps: int = 2
    jax: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.sequence


_10M = _llama(256, 768, 8, 8, 4, 8192)
_100M = _llama(768, 2048, 12, 12, 4, 16384)
_125M = _llama(768, 2048, 12, 12, 12, 32000)
_1B = _llama(2048, 8192, 16, 32, 8, 128256, rope_theta=500000.0, tie_word_embeddings=True)
_8B = _llama(4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0)
_FULL, _PRODUCTS = {"remat": "full"}, {"remat": "products"}
_CHECKPOINTED = {"activation_checkpointing": True}

CPU = tuple(
    Case(f"{size}-{sequence}-{precision}", model, sequence, rows, precision, blocks=blocks, block_steps=steps, jax=_PRODUCTS)
    for size, model, tokens, blocks, steps in (("10M", _10M, 2048, 5, 2), ("100M", _100M, 2048, 3, 1))
    for sequence in (512, 2048)
    for precision in ("fp32", "bf16")
    for rows in (tokens // sequence,)
)
# In the order of what is to be reached, since the suite's time is short.
GPU = (
    Case("8B-4096-bf16", _8B, 4096, 1, "bf16", blocks=2, block_steps=2, jax=_FULL, deepspeed=_CHECKPOINTED),
    Case("1B-4096-bf16", _1B, 4096, 4, "bf16", block_steps=3, jax=_FULL, deepspeed=_CHECKPOINTED),
    # The shape of Llama 3 8B with 8 of its 32 layers: weights, moments and gradients of all 32 need 128 GB beside activations.
    Case("8B-shape-8-layers-4096-bf16", {**_8B, "num_hidden_layers": 8}, 4096, 2, "bf16", block_steps=2, jax=_FULL,
         deepspeed=_CHECKPOINTED),
    Case("125M-4096-bf16", _125M, 4096, 16, "bf16", block_steps=5),
)  # fmt: skip
SUITES = {"cpu": CPU, "gpu": GPU}
