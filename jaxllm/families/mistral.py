"""Mistral (arXiv:2310.06825): Llama's layers, each of which sees a sliding window."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys, fill_in_head_dim
from jaxllm.families.keys import ActivationName
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Mistral")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS)


class Keys(DecoderKeys):
    """transformers.MistralConfig."""

    intermediate_size: int = Field(14336, ge=1)
    num_key_value_heads: int | None = Field(8, ge=1)
    head_dim: int | None = Field(None, ge=1)
    hidden_act: ActivationName = "silu"
    max_position_embeddings: int = Field(131072, ge=1)
    sliding_window: int | None = Field(4096, ge=1)

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys."""
        fill_in_head_dim(cls, keys)
        return super().filled_in(keys)


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Mistral config, with the task's head."""
    attention = keys.attention(rope=keys.rope, window=keys.sliding_window)
    return keys.model(task, (attention,) * keys.num_hidden_layers, keys.hidden_act)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Mistral model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS)
