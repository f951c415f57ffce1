"""Qwen3 (arXiv:2505.09388): Llama's layers, each head of query and key normalised by itself."""

from __future__ import annotations

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.qwen2 import QwenKeys
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Qwen3")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS)


class Keys(QwenKeys):
    """transformers.Qwen3Config."""

    head_dim: int = Field(128, ge=1)
    attention_bias: bool = False


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Qwen3 config, with the task's head."""
    bias = keys.attention_bias
    attention = keys.attention(rope=keys.rope, query_key_norm="head", qkv_bias=bias, output_bias=bias)
    return keys.model(task, keys.attentions(attention), keys.hidden_act)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Qwen3 model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS)
