"""Gemma (arXiv:2403.08295): scales of norms around one, embeddings scaled by sqrt(hidden size), gated tanh-GELU MLP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys
from jaxllm.families.keys import ActivationName
from jaxllm.families.spec import AttentionSpec, ModelSpec, NormPlace, NormSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Gemma")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS)


class GemmaKeys(DecoderKeys):
    """What every Gemma has."""

    vocab_size: int = Field(256000, ge=1)
    head_dim: int = Field(256, ge=1)
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    def gemma(
        self, task: Task, place: NormPlace, attentions: tuple[AttentionSpec, ...], activation: ActivationName, **more: Any
    ) -> ModelSpec:
        """The ModelSpec of a Gemma with its norms in this place."""
        norm = NormSpec("rms", self.rms_norm_eps, place, unit_offset=True, rounds_late=True)
        return self.model(task, attentions, activation, norm=norm, embedding_scale=self.hidden_size**0.5, **more)

    def gemma_attention(self, **more: Any) -> AttentionSpec:
        """What every layer's attention has in common."""
        return self.attention(qkv_bias=self.attention_bias, output_bias=self.attention_bias, **more)


class Keys(GemmaKeys):
    """transformers.GemmaConfig."""

    hidden_size: int = Field(3072, ge=1)
    intermediate_size: int = Field(24576, ge=1)
    num_hidden_layers: int = Field(28, ge=1)
    num_attention_heads: int = Field(16, ge=1)
    num_key_value_heads: int | None = Field(16, ge=1)
    hidden_act: ActivationName = "gelu_pytorch_tanh"
    max_position_embeddings: int = Field(8192, ge=1)
    use_bidirectional_attention: Literal[False] | None = None

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys; the first Gemma's "gelu" has always meant its tanh approximation."""
        if keys.get("hidden_act") == "gelu":
            keys["hidden_act"] = "gelu_pytorch_tanh"
        return super().filled_in(keys)


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Gemma config, with the task's head."""
    return keys.gemma(task, "pre", (keys.gemma_attention(rope=keys.rope),) * keys.num_hidden_layers, keys.hidden_act)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Gemma model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS)
