"""Gemma 2 (arXiv:2408.00118): norms before and after attention and MLP, every other layer with a window, soft caps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import LayerType, by_layer_type, check_layer_types
from jaxllm.families.gemma import GemmaKeys
from jaxllm.families.keys import ActivationName
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Gemma2")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.SANDWICH_NORMS)


class Gemma2Keys(GemmaKeys):
    """What Gemma 2 and 3 have in common: layers with a window between layers without, in turn.

    One layer in `turn` has no window, the last of them.
    """

    hidden_size: int = Field(2304, ge=1)
    intermediate_size: int = Field(9216, ge=1)
    num_hidden_layers: int = Field(26, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    num_key_value_heads: int | None = Field(4, ge=1)
    hidden_activation: ActivationName = "gelu_pytorch_tanh"
    query_pre_attn_scalar: int = Field(256, ge=1)
    sliding_window: int | None = Field(4096, ge=1)
    layer_types: list[LayerType] = Field(default_factory=list)
    final_logit_softcapping: float | None = Field(None, gt=0)

    @property
    def _heads_divide_hidden(self) -> bool:
        return True  # transformers refuses anything else

    @model_validator(mode="after")
    def _layer_types_fit(self) -> Gemma2Keys:
        check_layer_types(self)
        return self


def fill_in_layer_types(cls: type[Gemma2Keys], keys: dict[str, Any], turn: object) -> None:
    """Where they are not given, one layer in `turn` has no window."""
    layers = cls.given(keys, "num_hidden_layers")
    if not keys.get("layer_types") and type(layers) is int and type(turn) is int and turn > 0:
        keys["layer_types"] = ["sliding_attention" if (layer + 1) % turn else "full_attention" for layer in range(layers)]


class Keys(Gemma2Keys):
    """transformers.Gemma2Config."""

    max_position_embeddings: int = Field(8192, ge=1)
    final_logit_softcapping: float | None = Field(30.0, gt=0)
    attn_logit_softcapping: float | None = Field(50.0, gt=0)
    use_bidirectional_attention: Literal[False] | None = None

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys."""
        fill_in_layer_types(cls, keys, 2)
        return super().filled_in(keys)


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Gemma 2 config, with the task's head."""
    attention = keys.gemma_attention(
        rope=keys.rope, scale=keys.query_pre_attn_scalar**-0.5, softcap=keys.attn_logit_softcapping
    )
    attentions = by_layer_type(keys.layer_types, attention, keys.sliding_window)
    return keys.gemma(task, "sandwich", attentions, keys.hidden_activation, final_softcap=keys.final_logit_softcapping)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Gemma 2 model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.SANDWICH_NORMS)
