"""Llama (arXiv:2302.13971, arXiv:2407.21783): pre-norm RMSNorm, rotary positions, grouped queries, gated SiLU MLP."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys, fill_in_head_dim
from jaxllm.families.keys import ACTIVATIONS, ActivationName
from jaxllm.families.spec import MlpSpec, ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Llama")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS)


class Keys(DecoderKeys):
    """transformers.LlamaConfig."""

    head_dim: int | None = Field(None, ge=1)
    hidden_act: ActivationName = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys."""
        fill_in_head_dim(cls, keys)
        return super().filled_in(keys)

    @property
    def _heads_divide_hidden(self) -> bool:
        return True  # transformers refuses anything else, even when head_dim is given


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Llama config, with the task's head."""
    attention = keys.attention(rope=keys.rope, qkv_bias=keys.attention_bias, output_bias=keys.attention_bias)
    mlp = MlpSpec(keys.intermediate_size, ACTIVATIONS[keys.hidden_act], gated=True, bias=keys.mlp_bias)
    return keys.model(task, (attention,) * keys.num_hidden_layers, keys.hidden_act, mlp=mlp)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Llama model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS)
