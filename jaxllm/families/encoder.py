"""What BERT and the families after it have in common: the config keys, the encoder and the names of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from jaxllm.families.initialization import Initializer
from jaxllm.families.keys import ACTIVATIONS, ActivationName, HuggingFaceKeys, check_pad_token
from jaxllm.families.points import ModulePoint
from jaxllm.families.spec import Activation, AttentionSpec, HeadSpec, MlpSpec, ModelSpec, NormSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

# Checkpoints from before transformers had these names; the library still reads them.
OLD_SPELLINGS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


class EncoderKeys(HuggingFaceKeys):
    """The keys of transformers.BertConfig and RobertaConfig."""

    vocab_size: int = Field(30522, ge=1)
    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    hidden_act: ActivationName = "gelu"
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    max_position_embeddings: int = Field(512, ge=1)
    type_vocab_size: int = Field(2, ge=1)
    initializer_range: float = Field(0.02, gt=0)
    layer_norm_eps: float = Field(1e-12, ge=0)
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = Field(None, ge=0, lt=1)
    position_embedding_type: Literal["absolute"] = Field("absolute", exclude=True)
    is_decoder: Literal[False] = Field(False, exclude=True)
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: Literal[True] = True

    @model_validator(mode="after")
    def _sizes_fit(self) -> EncoderKeys:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        check_pad_token(self.pad_token_id, self.vocab_size)
        return self

    @property
    def head_dropout(self) -> float:
        """Dropout of a classification head."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


@dataclass(frozen=True)
class HeadNames:
    """Where a family keeps the weights of its heads; None: it has no such layer.

    lm_dense, lm_norm, lm_bias: of the masked language model.  pooler: the dense layer of the sequence classifier;
    classifier, token_classifier: the output layers.
    """

    lm_dense: str
    lm_norm: str
    lm_bias: str
    lm_decoder: str
    pooler: str
    classifier: str
    token_classifier: str = "classifier"


def points(base: str) -> dict[str, ModulePoint]:
    """Where the points of a post-norm encoder lie; base: name of the encoder among the model's modules."""
    layer = f"{base}.encoder.layer.{{layer}}"
    return {
        "embedding": ModulePoint(f"{base}.encoder.layer.0", "input"),
        "layers.{layer}.query": ModulePoint(f"{layer}.attention.self", "query"),
        "layers.{layer}.key": ModulePoint(f"{layer}.attention.self", "key"),
        "layers.{layer}.value": ModulePoint(f"{layer}.attention.self", "value"),
        "layers.{layer}.attention_output": ModulePoint(f"{layer}.attention.output.dense"),
        "layers.{layer}.attention_residual": ModulePoint(f"{layer}.attention.output.LayerNorm", "input"),
        "layers.{layer}.attention_residual_norm": ModulePoint(f"{layer}.attention.output.LayerNorm"),
        "layers.{layer}.mlp_output": ModulePoint(f"{layer}.output.dense"),
        "layers.{layer}.mlp_residual": ModulePoint(f"{layer}.output.LayerNorm", "input"),
        "layers.{layer}.residual": ModulePoint(layer),
    }


def encoder_spec(
    keys: EncoderKeys, task: Task, *, position_offset: int, dropout_before_dense: bool, lm_activation: Activation | None = None
) -> ModelSpec:
    """The ModelSpec of an encoder with the task's head.  lm_activation: of the masked LM's; default, hidden_act."""
    head_dim = keys.hidden_size // keys.num_attention_heads
    norm = NormSpec("layer", keys.layer_norm_eps, "post")
    activation = ACTIVATIONS[keys.hidden_act]
    head = HeadSpec(
        kind=task.head,
        outputs=len(task.labels) or keys.vocab_size,
        loss=task.loss,
        dense={"masked-lm": lm_activation or activation, "sequence-classification": "tanh"}.get(task.head),
        dropout=0.0 if task.head == "masked-lm" else keys.head_dropout,
        dropout_before_dense=dropout_before_dense,
        pool="first" if task.head == "sequence-classification" else None,
    )
    attention = AttentionSpec(
        heads=keys.num_attention_heads,
        kv_heads=keys.num_attention_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=True,
        output_bias=True,
        dropout=keys.attention_probs_dropout_prob,
        causal=False,
    )
    return ModelSpec(
        vocab_size=keys.vocab_size,
        hidden_size=keys.hidden_size,
        max_positions=keys.max_position_embeddings - position_offset,
        norm=norm,
        attentions=(attention,) * keys.num_hidden_layers,
        mlp=MlpSpec(keys.intermediate_size, activation, gated=False, bias=True),
        learned_positions=True,
        tie_embeddings=True,
        embedding_dropout=keys.hidden_dropout_prob,
        residual_dropout=keys.hidden_dropout_prob,
        padding_token=keys.pad_token_id,
        token_types=keys.type_vocab_size,
        position_offset=position_offset,
        head=head,
    )


def encoder_rules(
    keys: EncoderKeys, model: ModelSpec, base: str, names: HeadNames, *, position_padding: int | None
) -> tuple[WeightRule, ...]:
    """Every weight of an encoder and its head, in checkpoint order.

    base: name of the encoder.  position_padding: the row of the position embeddings that starts at zero, if one does.
    """
    normal, zeros = Initializer("normal", keys.initializer_range), Initializer("zeros")
    words = Initializer("normal", keys.initializer_range, zero_row=keys.pad_token_id)
    places = Initializer("normal", keys.initializer_range, zero_row=position_padding)
    rule = partial(WeightRule, sizes=model.sizes)
    layer = partial(rule, layers=model.layers)
    embeddings, at = f"{base}.embeddings", f"{base}.encoder.layer.{{layer}}"
    heads, out = "(heads head_dim)", "embed (heads head_dim) -> heads head_dim embed"
    lm = model.head.kind == "masked-lm"
    decoder = (f"{names.lm_decoder}.weight",) if lm else ()

    table = [
        rule(f"{embeddings}.word_embeddings.weight", ("embed.embedding",), "vocab embed -> vocab embed", "embedding", words,
             aliases=decoder),
        rule(f"{embeddings}.position_embeddings.weight", ("position_embed.embedding",), "position embed -> position embed",
             "embedding", places),
        rule(f"{embeddings}.token_type_embeddings.weight", ("token_type_embed.embedding",),
             "token_type embed -> token_type embed", "embedding", normal),
        *_norm_rules(rule, f"{embeddings}.LayerNorm", "embedding_norm"),
    ]  # fmt: skip
    for name in ("query", "key", "value"):
        table += [
            layer(f"{at}.attention.self.{name}.weight", (f"layers.attention.{name}.kernel",),
                  f"{heads} embed -> embed heads head_dim", "kernel", normal),
            layer(f"{at}.attention.self.{name}.bias", (f"layers.attention.{name}.bias",),
                  f"{heads} -> heads head_dim", "bias", zeros, idle=name == "key"),
        ]  # fmt: skip
    table += [
        layer(f"{at}.attention.output.dense.weight", ("layers.attention.output.kernel",), out, "kernel", normal),
        layer(f"{at}.attention.output.dense.bias", ("layers.attention.output.bias",), "embed -> embed", "bias", zeros),
        *_norm_rules(layer, f"{at}.attention.output.LayerNorm", "layers.attention_residual_norm"),
        layer(f"{at}.intermediate.dense.weight", ("layers.mlp.up.kernel",), "mlp embed -> embed mlp", "kernel", normal),
        layer(f"{at}.intermediate.dense.bias", ("layers.mlp.up.bias",), "mlp -> mlp", "bias", zeros),
        layer(f"{at}.output.dense.weight", ("layers.mlp.down.kernel",), "embed mlp -> mlp embed", "kernel", normal),
        layer(f"{at}.output.dense.bias", ("layers.mlp.down.bias",), "embed -> embed", "bias", zeros),
        *_norm_rules(layer, f"{at}.output.LayerNorm", "layers.mlp_residual_norm"),
    ]
    return (*table, *_head_rules(model, names, keys.initializer_range))


def _norm_rules(make: Callable[..., WeightRule], name: str, path: str) -> list[WeightRule]:
    return [
        make(f"{name}.weight", (f"{path}.scale",), "embed -> embed", "norm", Initializer("ones")),
        make(f"{name}.bias", (f"{path}.bias",), "embed -> embed", "norm", Initializer("zeros")),
    ]


def _head_rules(model: ModelSpec, names: HeadNames, std: float) -> list[WeightRule]:
    normal, zeros = Initializer("normal", std), Initializer("zeros")
    rule = partial(WeightRule, sizes=model.sizes)

    def dense(name: str) -> list[WeightRule]:
        return [
            rule(f"{name}.weight", ("head.dense.kernel",), "embed_out embed -> embed embed_out", "kernel", normal),
            rule(f"{name}.bias", ("head.dense.bias",), "embed_out -> embed_out", "bias", zeros),
        ]

    if model.head.kind == "masked-lm":
        bias = rule(names.lm_bias, ("head.bias",), "vocab -> vocab", "bias", zeros, aliases=(f"{names.lm_decoder}.bias",))
        return [bias, *dense(names.lm_dense), *_norm_rules(rule, names.lm_norm, "head.norm")]
    pooled = model.head.kind == "sequence-classification"
    output = names.classifier if pooled else names.token_classifier
    return [
        *(dense(names.pooler) if pooled else []),
        rule(f"{output}.weight", ("head.output.kernel",), "label embed -> embed label", "kernel", normal),
        rule(f"{output}.bias", ("head.output.bias",), "label -> label", "bias", zeros),
    ]
