"""Llama (arXiv:2302.13971, arXiv:2407.21783): pre-norm RMSNorm, rotary positions, grouped queries, gated SiLU MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from jaxllm.families.initialization import Initializer
from jaxllm.families.keys import ACTIVATIONS, ActivationName, HuggingFaceKeys, check_pad_token
from jaxllm.families.points import ModulePoint
from jaxllm.families.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec
from jaxllm.families.weights import WeightRule

ARCHITECTURE = "LlamaForCausalLM"
BASE_PREFIX = "model."
MAX_POSITIONS_KEY = "max_position_embeddings"
_LAYER = "model.layers.{layer}"
POINTS = {
    "embedding": ModulePoint("model.layers.0", "input"),
    "layers.{layer}.attention_norm": ModulePoint(f"{_LAYER}.input_layernorm"),
    "layers.{layer}.query": ModulePoint(f"{_LAYER}.self_attn", "query"),
    "layers.{layer}.key": ModulePoint(f"{_LAYER}.self_attn", "key"),
    "layers.{layer}.value": ModulePoint(f"{_LAYER}.self_attn", "value"),
    "layers.{layer}.attention_output": ModulePoint(f"{_LAYER}.self_attn.o_proj"),
    "layers.{layer}.attention_residual": ModulePoint(f"{_LAYER}.post_attention_layernorm", "input"),
    "layers.{layer}.mlp_norm": ModulePoint(f"{_LAYER}.post_attention_layernorm"),
    "layers.{layer}.mlp_output": ModulePoint(f"{_LAYER}.mlp"),
    "layers.{layer}.residual": ModulePoint(_LAYER),
    "final_norm": ModulePoint("model.norm"),
}


class RopeParameters(HuggingFaceKeys):
    """Rotary position embedding."""

    rope_theta: float = Field(10000.0, gt=0)
    rope_type: Literal["default"] = "default"


def _describe_older_spellings(schema: dict[str, Any]) -> None:
    """The JSON Schema tells editors of what `Keys._fill_in` reads besides the fields."""
    schema["properties"]["rope_theta"] = {"type": "number", "exclusiveMinimum": 0, "description": "As in rope_parameters."}


class Keys(HuggingFaceKeys):
    """transformers.LlamaConfig."""

    model_config = ConfigDict(json_schema_extra=_describe_older_spellings)

    vocab_size: int = Field(32000, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(11008, ge=1)
    num_hidden_layers: int = Field(32, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    hidden_act: ActivationName = "silu"
    max_position_embeddings: int = Field(2048, ge=1)
    initializer_range: float = Field(0.02, gt=0, le=1)
    rms_norm_eps: float = Field(1e-6, ge=0)
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    mlp_bias: bool = False
    rope_scaling: None = Field(None, exclude=True, description="Scaled rotary positions are not supported; only null.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: object) -> object:
        """Read the spellings of transformers before version 5, and fill in what follows from other keys."""
        return _filled_in(dict(data)) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _sizes_fit(self) -> Keys:
        if self.hidden_size % self.num_attention_heads:  # transformers refuses this even when head_dim is given
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}; each key/value head serves the same number of query heads"
            )
        if (self.head_dim or 0) % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions pair its dimensions")
        check_pad_token(self.pad_token_id, self.vocab_size)
        return self


def _filled_in(keys: dict[str, Any]) -> dict[str, Any]:
    scaling = keys.get("rope_scaling")
    if "rope_scaling" in keys and (scaling is None or _rope_type(scaling) == "default"):
        del keys["rope_scaling"]  # otherwise it stays, and is refused by its name
    if "rope_theta" in keys and "rope_parameters" not in keys:
        keys["rope_parameters"] = {"rope_theta": keys.pop("rope_theta"), "rope_type": "default"}
    if keys.get("rope_parameters", 0) is None:
        del keys["rope_parameters"]
    fields = Keys.model_fields
    heads = keys.get("num_attention_heads", fields["num_attention_heads"].default)
    hidden_size = keys.get("hidden_size", fields["hidden_size"].default)
    if type(heads) is int and heads > 0:
        if keys.get("num_key_value_heads") is None:
            keys["num_key_value_heads"] = heads
        if keys.get("head_dim") is None and type(hidden_size) is int and hidden_size >= heads:
            keys["head_dim"] = hidden_size // heads
    return keys


def _rope_type(scaling: object) -> object:
    return scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else scaling


def spec(keys: Keys) -> ModelSpec:
    """The ModelSpec of a Llama config."""
    head_dim = keys.head_dim or keys.hidden_size // keys.num_attention_heads
    return ModelSpec(
        vocab_size=keys.vocab_size,
        hidden_size=keys.hidden_size,
        layers=keys.num_hidden_layers,
        max_positions=keys.max_position_embeddings,
        norm=NormSpec("rms", keys.rms_norm_eps),
        attention=AttentionSpec(
            heads=keys.num_attention_heads,
            kv_heads=keys.num_key_value_heads or keys.num_attention_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=keys.attention_bias,
            output_bias=keys.attention_bias,
            dropout=keys.attention_dropout,
        ),
        mlp=MlpSpec(keys.intermediate_size, ACTIVATIONS[keys.hidden_act], gated=True, bias=keys.mlp_bias),
        rope=RopeSpec(keys.rope_parameters.rope_theta),
        learned_positions=False,
        tie_embeddings=keys.tie_word_embeddings,
        embedding_dropout=0.0,
        residual_dropout=0.0,
        padding_token=keys.pad_token_id,
    )


def rules(keys: Keys) -> tuple[WeightRule, ...]:
    """Every weight of a Llama model, in checkpoint order."""
    model = spec(keys)
    normal, ones, zeros = Initializer("normal", keys.initializer_range), Initializer("ones"), Initializer("zeros")
    embedding = Initializer("normal", keys.initializer_range, zero_row=keys.pad_token_id)
    rule = partial(WeightRule, sizes=model.sizes)
    layer = partial(rule, layers=model.layers)
    at, to = "model.layers.{layer}.self_attn", "layers.attention"
    mlp, mlp_to = "model.layers.{layer}.mlp", "layers.mlp"
    head = ("lm_head.weight",)
    table = [
        rule("model.embed_tokens.weight", ("embed.embedding",), "vocab embed -> vocab embed", "embedding", embedding,
             aliases=head if model.tie_embeddings else ()),
        layer("model.layers.{layer}.input_layernorm.weight", ("layers.attention_norm.scale",), "embed -> embed", "norm", ones),
        layer(f"{at}.q_proj.weight", (f"{to}.query.kernel",),
              "(heads head_dim) embed -> embed heads head_dim", "kernel", normal),
        layer(f"{at}.k_proj.weight", (f"{to}.key.kernel",),
              "(kv_heads head_dim) embed -> embed kv_heads head_dim", "kernel", normal),
        layer(f"{at}.v_proj.weight", (f"{to}.value.kernel",),
              "(kv_heads head_dim) embed -> embed kv_heads head_dim", "kernel", normal),
        layer(f"{at}.o_proj.weight", (f"{to}.output.kernel",),
              "embed (heads head_dim) -> heads head_dim embed", "kernel", normal),
        layer("model.layers.{layer}.post_attention_layernorm.weight", ("layers.mlp_norm.scale",),
              "embed -> embed", "norm", ones),
        layer(f"{mlp}.gate_proj.weight", (f"{mlp_to}.gate.kernel",), "mlp embed -> embed mlp", "kernel", normal),
        layer(f"{mlp}.up_proj.weight", (f"{mlp_to}.up.kernel",), "mlp embed -> embed mlp", "kernel", normal),
        layer(f"{mlp}.down_proj.weight", (f"{mlp_to}.down.kernel",), "embed mlp -> mlp embed", "kernel", normal),
        rule("model.norm.weight", ("final_norm.scale",), "embed -> embed", "norm", ones),
    ]  # fmt: skip
    if keys.attention_bias:
        heads = "(heads head_dim) -> heads head_dim"
        table += [
            layer(f"{at}.q_proj.bias", (f"{to}.query.bias",), heads, "bias", zeros),
            layer(f"{at}.k_proj.bias", (f"{to}.key.bias",), "(kv_heads head_dim) -> kv_heads head_dim", "bias", zeros),
            layer(f"{at}.v_proj.bias", (f"{to}.value.bias",), "(kv_heads head_dim) -> kv_heads head_dim", "bias", zeros),
            layer(f"{at}.o_proj.bias", (f"{to}.output.bias",), "embed -> embed", "bias", zeros),
        ]
    if keys.mlp_bias:
        table += [
            layer(f"{mlp}.gate_proj.bias", (f"{mlp_to}.gate.bias",), "mlp -> mlp", "bias", zeros),
            layer(f"{mlp}.up_proj.bias", (f"{mlp_to}.up.bias",), "mlp -> mlp", "bias", zeros),
            layer(f"{mlp}.down_proj.bias", (f"{mlp_to}.down.bias",), "embed -> embed", "bias", zeros),
        ]
    if not model.tie_embeddings:
        table.append(rule(head[0], ("head.kernel",), "vocab embed -> embed vocab", "kernel", normal))
    return tuple(table)
