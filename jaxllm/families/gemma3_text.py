"""Gemma 3 for text (arXiv:2503.19786): Gemma 2 with q/k norm for soft caps, five layers with a window to one without.

Layers with a window have rotary positions of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import by_layer_type
from jaxllm.families.gemma2 import Gemma2Keys, fill_in_layer_types
from jaxllm.families.keys import HuggingFaceKeys
from jaxllm.families.rope_keys import RopeParameters, RopeType, read_rope
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = {"causal-lm": "Gemma3ForCausalLM", "sequence-classification": "Gemma3TextForSequenceClassification"}
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.SANDWICH_NORMS)
_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
_TURN = 6


class RopeByType(HuggingFaceKeys):
    """Rotary positions of layers with and without a window."""

    full_attention: RopeParameters = RopeParameters(rope_theta=_GLOBAL_THETA)
    sliding_attention: RopeParameters = RopeParameters(rope_theta=_LOCAL_THETA)


class Keys(Gemma2Keys):
    """transformers.Gemma3TextConfig."""

    ROPE_TYPES: ClassVar[tuple[RopeType, ...]] = ("default", "linear", "llama3")

    vocab_size: int = Field(262208, ge=1)
    max_position_embeddings: int = Field(131072, ge=1)
    rope_parameters: RopeByType = RopeByType()  # type: ignore[assignment]
    attn_logit_softcapping: None = Field(None, description="Without effect in transformers' Gemma 3; only null.")
    use_bidirectional_attention: Literal[False] | None = False

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys; before transformers 5 there were `rope_local_base_freq` and `sliding_window_pattern`."""
        fill_in_layer_types(cls, keys, keys.pop("sliding_window_pattern", _TURN))
        given, scaling = keys.get("rope_parameters") or {}, keys.pop("rope_scaling", None)
        if isinstance(given, Mapping) and (scaling is None or isinstance(scaling, Mapping)):
            positions = cls.given(keys, "max_position_embeddings")
            whole = {"rope_parameters": {**(given.get("full_attention") or {}), **(scaling or {})}}
            local = {"rope_parameters": given.get("sliding_attention")}
            read_rope(whole, keys.pop("rope_theta", None) or _GLOBAL_THETA, positions)
            read_rope(local, keys.pop("rope_local_base_freq", None) or _LOCAL_THETA, positions)
            rest = {name: value for name, value in given.items() if name not in RopeByType.model_fields}
            both = {"full_attention": whole["rope_parameters"], "sliding_attention": local["rope_parameters"]}
            keys["rope_parameters"] = {**both, **rest}
        if cls.given(keys, "num_key_value_heads") is None:
            keys["num_key_value_heads"] = cls.given(keys, "num_attention_heads")
        return keys

    @property
    def _longest(self) -> int:
        return self.max_position_embeddings

    def _rope_fits(self) -> None:
        self.check_rope(self.rope_parameters.full_attention)
        self.check_rope(self.rope_parameters.sliding_attention)


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Gemma 3 config, with the task's head."""
    positions = keys.max_position_embeddings
    rope, local = (
        parameters.spec(positions)
        for parameters in (keys.rope_parameters.full_attention, keys.rope_parameters.sliding_attention)
    )
    attention = keys.gemma_attention(rope=rope, scale=keys.query_pre_attn_scalar**-0.5, query_key_norm="head")
    attentions = by_layer_type(keys.layer_types, attention, keys.sliding_window, local)
    return keys.gemma(task, "sandwich", attentions, keys.hidden_activation, final_softcap=keys.final_logit_softcapping)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Gemma 3 model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.SANDWICH_NORMS)
