"""GPT-2 (Radford et al., 2019): pre-norm LayerNorm, learned positions, fused query-key-value, tanh-GELU MLP, tied head."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from jaxllm.families.decoder import head_rules, tied_head
from jaxllm.families.initialization import Initializer
from jaxllm.families.keys import ACTIVATIONS, CLASSIFIER_DROPOUT, ActivationName, HuggingFaceKeys, check_pad_token
from jaxllm.families.points import ModulePoint
from jaxllm.families.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec
from jaxllm.families.tasks import Task, decoder_head
from jaxllm.families.weights import WeightRule

ARCHITECTURES = {
    "causal-lm": "GPT2LMHeadModel",
    "sequence-classification": "GPT2ForSequenceClassification",
    "token-classification": "GPT2ForTokenClassification",
}
BASE_PREFIX = "transformer."
MAX_POSITIONS_KEY = "n_positions"
_LAYER = "transformer.h.{layer}"
POINTS = {
    "embedding": ModulePoint("transformer.h.0", "input"),
    "layers.{layer}.attention_norm": ModulePoint(f"{_LAYER}.ln_1"),
    "layers.{layer}.query": ModulePoint(f"{_LAYER}.attn", "query"),
    "layers.{layer}.key": ModulePoint(f"{_LAYER}.attn", "key"),
    "layers.{layer}.value": ModulePoint(f"{_LAYER}.attn", "value"),
    "layers.{layer}.attention_output": ModulePoint(f"{_LAYER}.attn.c_proj"),
    "layers.{layer}.attention_residual": ModulePoint(f"{_LAYER}.ln_2", "input"),
    "layers.{layer}.mlp_norm": ModulePoint(f"{_LAYER}.ln_2"),
    "layers.{layer}.mlp_output": ModulePoint(f"{_LAYER}.mlp"),
    "layers.{layer}.residual": ModulePoint(_LAYER),
    "final_norm": ModulePoint("transformer.ln_f"),
}


class Keys(HuggingFaceKeys):
    """transformers.GPT2Config."""

    vocab_size: int = Field(50257, ge=1)
    n_positions: int = Field(1024, ge=1)
    n_embd: int = Field(768, ge=1)
    n_layer: int = Field(12, ge=1)
    n_head: int = Field(12, ge=1)
    n_inner: int | None = Field(None, ge=1)
    activation_function: ActivationName = "gelu_new"
    resid_pdrop: float = Field(0.1, ge=0, lt=1)
    embd_pdrop: float = Field(0.1, ge=0, lt=1)
    attn_pdrop: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-5, ge=0)
    initializer_range: float = Field(0.02, gt=0)
    scale_attn_weights: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    reorder_and_upcast_attn: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True
    classifier_dropout: float | None = Field(None, ge=0, lt=1, exclude=True, description=CLASSIFIER_DROPOUT)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Keys:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; change one of them")
        check_pad_token(self.pad_token_id, self.vocab_size)
        return self


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a GPT-2 config, with the task's head."""
    head_dim = keys.n_embd // keys.n_head
    attention = AttentionSpec(
        heads=keys.n_head,
        kv_heads=keys.n_head,
        head_dim=head_dim,
        scale=head_dim**-0.5 if keys.scale_attn_weights else 1.0,
        qkv_bias=True,
        output_bias=True,
        dropout=keys.attn_pdrop,
    )
    return ModelSpec(
        vocab_size=keys.vocab_size,
        hidden_size=keys.n_embd,
        max_positions=keys.n_positions,
        norm=NormSpec("layer", keys.layer_norm_epsilon),
        attentions=(attention,) * keys.n_layer,
        mlp=MlpSpec(keys.n_inner or 4 * keys.n_embd, ACTIVATIONS[keys.activation_function], gated=False, bias=True),
        learned_positions=True,
        tie_embeddings=keys.tie_word_embeddings,
        embedding_dropout=keys.embd_pdrop,
        residual_dropout=keys.resid_pdrop,
        head=decoder_head(task, keys.pad_token_id, keys.classifier_dropout),
    )


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a GPT-2 model, in checkpoint order.  Its Conv1D kernels are (in, out), unlike torch's Linear."""
    model = spec(keys, task)
    normal, ones, zeros = Initializer("normal", keys.initializer_range), Initializer("ones"), Initializer("zeros")
    # Both projections back into the residual stream start smaller by 1 / sqrt(number of residual additions).
    residual = Initializer("normal", keys.initializer_range / (2 * model.layers) ** 0.5)
    rule = partial(WeightRule, sizes=model.sizes)
    layer = partial(rule, layers=model.layers)
    at, to = "transformer.h.{layer}.attn", "layers.attention"
    mlp, mlp_to = "transformer.h.{layer}.mlp", "layers.mlp"
    qkv = (f"{to}.query", f"{to}.key", f"{to}.value")
    table = [
        rule("transformer.wte.weight", ("embed.embedding",), "vocab embed -> vocab embed", "embedding", normal,
             aliases=tied_head(model)),
        rule("transformer.wpe.weight", ("position_embed.embedding",), "position embed -> position embed", "embedding", normal),
        layer("transformer.h.{layer}.ln_1.weight", ("layers.attention_norm.scale",), "embed -> embed", "norm", ones),
        layer("transformer.h.{layer}.ln_1.bias", ("layers.attention_norm.bias",), "embed -> embed", "norm", zeros),
        layer(f"{at}.c_attn.weight", tuple(f"{path}.kernel" for path in qkv),
              "embed (three heads head_dim) -> three embed heads head_dim", "kernel", normal),
        layer(f"{at}.c_attn.bias", tuple(f"{path}.bias" for path in qkv),
              "(three heads head_dim) -> three heads head_dim", "bias", zeros),
        layer(f"{at}.c_proj.weight", (f"{to}.output.kernel",),
              "(heads head_dim) embed -> heads head_dim embed", "kernel", residual),
        layer(f"{at}.c_proj.bias", (f"{to}.output.bias",), "embed -> embed", "bias", zeros),
        layer("transformer.h.{layer}.ln_2.weight", ("layers.mlp_norm.scale",), "embed -> embed", "norm", ones),
        layer("transformer.h.{layer}.ln_2.bias", ("layers.mlp_norm.bias",), "embed -> embed", "norm", zeros),
        layer(f"{mlp}.c_fc.weight", (f"{mlp_to}.up.kernel",), "embed mlp -> embed mlp", "kernel", normal),
        layer(f"{mlp}.c_fc.bias", (f"{mlp_to}.up.bias",), "mlp -> mlp", "bias", zeros),
        layer(f"{mlp}.c_proj.weight", (f"{mlp_to}.down.kernel",), "mlp embed -> mlp embed", "kernel", residual),
        layer(f"{mlp}.c_proj.bias", (f"{mlp_to}.down.bias",), "embed -> embed", "bias", zeros),
        rule("transformer.ln_f.weight", ("final_norm.scale",), "embed -> embed", "norm", ones),
        rule("transformer.ln_f.bias", ("final_norm.bias",), "embed -> embed", "norm", zeros),
    ]  # fmt: skip
    return (*table, *head_rules(model, normal, classifier="classifier"))
