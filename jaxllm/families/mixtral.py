"""Mixtral (arXiv:2401.04088): Mistral's layers with eight MLPs each, of which every token takes two."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys
from jaxllm.families.keys import ACTIVATIONS, ActivationName
from jaxllm.families.rope_keys import RopeParameters
from jaxllm.families.spec import ExpertsSpec, MlpSpec, ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Mixtral")
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.PRE_NORMS, experts=True)

_MOE = f"{decoder.LAYER}.block_sparse_moe"
_STORED = {
    "router": (f"{_MOE}.gate.weight",),
    "gate_up": (f"{_MOE}.experts.{{expert}}.w1.weight", f"{_MOE}.experts.{{expert}}.w3.weight"),
    "down": (f"{_MOE}.experts.{{expert}}.w2.weight",),
}
"""How checkpoints hold what transformers 5 has in one tensor."""


class Keys(DecoderKeys):
    """transformers.MixtralConfig."""

    ROPE_THETA: ClassVar[float] = 1_000_000.0

    intermediate_size: int = Field(14336, ge=1)
    num_key_value_heads: int | None = Field(8, ge=1)
    head_dim: int | None = Field(None, ge=1)
    hidden_act: ActivationName = "silu"
    max_position_embeddings: int = Field(131072, ge=1)
    rms_norm_eps: float = Field(1e-5, ge=0)
    rope_parameters: RopeParameters = RopeParameters(rope_theta=ROPE_THETA)
    sliding_window: int | None = Field(None, ge=1)
    num_experts_per_tok: int = Field(2, ge=1)
    num_local_experts: int = Field(8, ge=1)
    output_router_logits: bool = Field(False, description="Whether the load-balancing loss is a part of the loss.")
    router_aux_loss_coef: float = Field(0.001, ge=0)
    router_jitter_noise: float = Field(0.0, ge=0, le=0, description="Noise on the router's input; only 0.")

    @model_validator(mode="after")
    def _experts_fit(self) -> Keys:
        check_experts(self.num_experts_per_tok, self.num_local_experts, "num_local_experts")
        return self


def check_experts(per_token: int, count: int, key: str) -> None:
    """ValueError when a token wants more experts than there are."""
    if per_token > count:
        raise ValueError(f"num_experts_per_tok {per_token} is more than {key} {count}")


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a Mixtral config, with the task's head."""
    balance = keys.router_aux_loss_coef if keys.output_router_logits else 0.0
    experts = ExpertsSpec(
        keys.num_local_experts, keys.num_experts_per_tok, normalised=True, rounds_weights=False, balance=balance
    )
    mlp = MlpSpec(keys.intermediate_size, ACTIVATIONS[keys.hidden_act], gated=True, bias=False, experts=experts)
    attention = keys.attention(rope=keys.rope, window=keys.sliding_window)
    return keys.model(task, (attention,) * keys.num_hidden_layers, keys.hidden_act, mlp=mlp)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a Mixtral model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.PRE_NORMS, experts=_STORED)
