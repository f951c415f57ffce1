"""Phi-3 and Phi-4 (arXiv:2404.14219): Llama's layers with query, key and value in one tensor, gate and up in another."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys
from jaxllm.families.keys import ActivationName
from jaxllm.families.rope_keys import RopeParameters, RopeType
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Phi3")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS)


class Keys(DecoderKeys):
    """transformers.Phi3Config."""

    ROPE_TYPES: ClassVar[tuple[RopeType, ...]] = ("default", "longrope")
    PARTIAL_ROTARY: ClassVar[bool] = True

    vocab_size: int = Field(32064, ge=1)
    hidden_size: int = Field(3072, ge=1)
    intermediate_size: int = Field(8192, ge=1)
    resid_pdrop: float = Field(0.0, ge=0, lt=1)
    embd_pdrop: float = Field(0.0, ge=0, le=0, description="Without effect in transformers; only 0.")
    hidden_act: ActivationName = "silu"
    max_position_embeddings: int = Field(4096, ge=1)
    original_max_position_embeddings: int = Field(4096, ge=1)
    rms_norm_eps: float = Field(1e-5, ge=0)
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=1.0)
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = Field(None, ge=1)

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys; LongRoPE has been called "su" and "yarn"."""
        keys = super().filled_in(keys)
        rope = keys["rope_parameters"]
        if isinstance(rope, dict) and rope["rope_type"] in ("su", "yarn", "longrope"):
            rope["rope_type"] = "longrope"
            rope["original_max_position_embeddings"] = cls.given(keys, "original_max_position_embeddings")
        return keys


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Phi-3 config, with the task's head."""
    attention = keys.attention(rope=keys.rope, window=keys.sliding_window)
    return keys.model(task, (attention,) * keys.num_hidden_layers, keys.hidden_act, residual_dropout=keys.resid_pdrop)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Phi-3 model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS, fused=True)
