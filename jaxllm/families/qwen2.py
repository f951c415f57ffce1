"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama's layers with biases on query, key and value, some with a sliding window."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys, LayerType, by_layer_type, check_layer_types
from jaxllm.families.keys import ActivationName
from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Qwen2")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS)


class QwenKeys(DecoderKeys):
    """What Qwen2 and Qwen3 have in common: the upper layers may have a window, if `use_sliding_window` says so."""

    vocab_size: int = Field(151936, ge=1)
    intermediate_size: int = Field(22016, ge=1)
    num_key_value_heads: int | None = Field(32, ge=1)
    hidden_act: ActivationName = "silu"
    max_position_embeddings: int = Field(32768, ge=1)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = Field(4096, ge=1)
    max_window_layers: int = Field(28, ge=0)
    layer_types: list[LayerType] = Field(default_factory=list)

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys; the window and the layers' types follow from the keys of before transformers 4.53."""
        if not cls.given(keys, "use_sliding_window"):
            keys["sliding_window"] = None
        layers, first = cls.given(keys, "num_hidden_layers"), cls.given(keys, "max_window_layers")
        if not keys.get("layer_types") and type(layers) is int and type(first) is int:
            has_window = cls.given(keys, "sliding_window") is not None
            types = ("sliding_attention" if has_window and layer >= first else "full_attention" for layer in range(layers))
            keys["layer_types"] = list(types)
        return super().filled_in(keys)

    @model_validator(mode="after")
    def _layer_types_fit(self) -> QwenKeys:
        check_layer_types(self)
        return self

    def attentions(self, attention: AttentionSpec) -> tuple[AttentionSpec, ...]:
        """The layers' attention, each with its window."""
        return by_layer_type(self.layer_types, attention, self.sliding_window)


class Keys(QwenKeys):
    """transformers.Qwen2Config."""


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Qwen2 config, with the task's head."""
    return keys.model(task, keys.attentions(keys.attention(rope=keys.rope, qkv_bias=True)), keys.hidden_act)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Qwen2 model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS)
