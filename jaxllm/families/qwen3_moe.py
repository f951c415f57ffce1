"""Qwen3 with experts (arXiv:2505.09388): Qwen3's attention, and many small MLPs of which every token takes a few."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys
from jaxllm.families.keys import ACTIVATIONS, ActivationName
from jaxllm.families.mixtral import check_experts
from jaxllm.families.spec import ExpertsSpec, MlpSpec, ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Qwen3Moe")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS, experts=True)

_EXPERT = f"{decoder.LAYER}.mlp.experts.{{expert}}"
_STORED = {
    "gate_up": (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight"),
    "down": (f"{_EXPERT}.down_proj.weight",),
}
"""How checkpoints hold what transformers 5 has in one tensor."""


class Keys(DecoderKeys):
    """transformers.Qwen3MoeConfig.  Every layer has experts, so that layers can be stacked."""

    vocab_size: int = Field(151936, ge=1)
    hidden_size: int = Field(2048, ge=1)
    intermediate_size: int = Field(6144, ge=1)
    num_hidden_layers: int = Field(24, ge=1)
    num_key_value_heads: int | None = Field(4, ge=1)
    head_dim: int | None = Field(None, ge=1)
    hidden_act: ActivationName = "silu"
    max_position_embeddings: int = Field(32768, ge=1)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = Field(4096, ge=1)
    decoder_sparse_step: Literal[1] = Field(1, description="Layers without experts are not supported; only 1.")
    moe_intermediate_size: int = Field(768, ge=1)
    num_experts_per_tok: int = Field(8, ge=1)
    num_experts: int = Field(128, ge=1)
    norm_topk_prob: bool = False
    output_router_logits: bool = Field(False, description="Whether the load-balancing loss is a part of the loss.")
    router_aux_loss_coef: float = Field(0.001, ge=0)
    mlp_only_layers: list[int] = Field([], max_length=0, description="Layers without experts are not supported; only [].")

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """As in DecoderKeys; transformers 5 also writes `num_local_experts`, and published configs have `max_window_layers`."""
        keys.pop("max_window_layers", None)  # of the dense Qwen3, without effect here
        if "num_local_experts" in keys:
            keys.setdefault("num_experts", keys.pop("num_local_experts"))
        if not cls.given(keys, "use_sliding_window"):
            keys["sliding_window"] = None
        if keys.get("mlp_only_layers", 0) is None:
            keys["mlp_only_layers"] = []
        return super().filled_in(keys)

    @model_serializer(mode="wrap")
    def _leave_out_head_dim(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Transformers has no such key either, unless a config gives it."""
        return {key: value for key, value in dump(self).items() if key != "head_dim" or value is not None}

    @model_validator(mode="after")
    def _experts_fit(self) -> Keys:
        check_experts(self.num_experts_per_tok, self.num_experts, "num_experts")
        return self


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Qwen3 config with experts, with the task's head."""
    balance, bias = keys.router_aux_loss_coef if keys.output_router_logits else 0.0, keys.attention_bias
    experts = ExpertsSpec(keys.num_experts, keys.num_experts_per_tok, keys.norm_topk_prob, rounds_weights=True, balance=balance)
    mlp = MlpSpec(keys.moe_intermediate_size, ACTIVATIONS[keys.hidden_act], gated=True, bias=False, experts=experts)
    attention = keys.attention(
        rope=keys.rope, window=keys.sliding_window, query_key_norm="head", qkv_bias=bias, output_bias=bias
    )
    return keys.model(task, (attention,) * keys.num_hidden_layers, keys.hidden_act, mlp=mlp)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Qwen3 model with experts, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS, experts=_STORED)
