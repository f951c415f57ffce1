"""T5 (arXiv:1910.10683) and T5 1.1 (arXiv:2002.05202): an encoder-decoder with biases of distances and no positions else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import Field, model_validator

from jaxllm.families.initialization import Initializer
from jaxllm.families.keys import ACTIVATIONS, HuggingFaceKeys, check_pad_token
from jaxllm.families.points import ModulePoint, Side
from jaxllm.families.spec import (
    UNLIMITED_POSITIONS,
    Activation,
    AttentionSpec,
    EncoderSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RelativeSpec,
)
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = {"seq2seq": "T5ForConditionalGeneration"}
BASE_PREFIX = ""
MAX_POSITIONS_KEY = "relative_attention_max_distance"
_GATED = "gated-"


class Keys(HuggingFaceKeys):
    """transformers.T5Config.

    tie_word_embeddings: false, as in T5 1.1, gives the head weights of its own.  scale_decoder_outputs: whether the head reads
    hidden states times d_model^-0.5; by default where the embeddings are tied.  num_decoder_layers: by default num_layers.
    """

    vocab_size: int = Field(32128, ge=1)
    d_model: int = Field(512, ge=1)
    d_kv: int = Field(64, ge=1)
    d_ff: int = Field(2048, ge=1)
    num_layers: int = Field(6, ge=1)
    num_decoder_layers: int = Field(6, ge=1)
    num_heads: int = Field(8, ge=1)
    relative_attention_num_buckets: int = Field(32, ge=4)
    relative_attention_max_distance: int = Field(128, ge=2)
    dropout_rate: float = Field(0.1, ge=0, lt=1)
    classifier_dropout: float = Field(0.0, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-6, ge=0)
    initializer_factor: float = Field(1.0, gt=0)
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int = 0
    # What config.json may hold besides; the keys above say the same, and T5 has no token that begins a text.
    bos_token_id: int | None = Field(None, exclude=True)
    n_positions: int | None = Field(None, exclude=True)
    output_past: bool | None = Field(None, exclude=True)
    dense_act_fn: str | None = Field(None, exclude=True)
    is_gated_act: bool | None = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, keys: Any) -> Any:
        """What is not given follows from other keys."""
        if not isinstance(keys, dict):
            return keys
        fields = cls.model_fields
        follows = {
            "num_decoder_layers": "num_layers",
            "scale_decoder_outputs": "tie_word_embeddings",
            "decoder_start_token_id": "pad_token_id",
        }
        filled = {key: keys.get(source, fields[source].default) for key, source in follows.items() if keys.get(key) is None}
        return {**keys, **filled}

    @model_validator(mode="after")
    def _computable(self) -> Keys:
        check_pad_token(self.pad_token_id, self.vocab_size)
        if self.feed_forward_proj.removeprefix(_GATED) not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"feed_forward_proj {self.feed_forward_proj!r} is none of {known}, alone or after {_GATED!r}; use one of them"
            )
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                f"relative_attention_num_buckets {self.relative_attention_num_buckets} is not divisible by 4: half of the "
                "buckets are for each direction, and half of those for single distances; change it"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance {self.relative_attention_max_distance} leaves nothing to the buckets of "
                f"ranges, which begin at distance {self.relative_attention_num_buckets // 2}; raise it"
            )
        if self.decoder_start_token_id != self.pad_token_id:
            raise ValueError(
                f"decoder_start_token_id {self.decoder_start_token_id} is not pad_token_id {self.pad_token_id}, with which "
                "jaxllm begins what a decoder reads; use a checkpoint in which they are the same"
            )
        return self

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.feed_forward_proj.startswith(_GATED)

    @property
    def activation(self) -> Activation:
        """Of the MLP.  Transformers takes gated-gelu to be the tanh approximation."""
        name = self.feed_forward_proj.removeprefix(_GATED)
        return "gelu_tanh" if self.feed_forward_proj == "gated-gelu" else ACTIVATIONS[name]  # type: ignore[index]


def _stack_points(stack: str, base: str, mlp: int, after_attention: str) -> dict[str, ModulePoint]:
    """Points of a stack's layers.  mlp: its place among the parts of a layer; after_attention: what reads the residual."""
    block = f"{stack}.block.{{layer}}"
    return {
        f"{base}embedding": ModulePoint(f"{stack}.block.0", "input"),
        f"{base}layers.{{layer}}.attention_norm": ModulePoint(f"{block}.layer.0.layer_norm"),
        **_attention_points(f"{base}layers.{{layer}}.", f"{block}.layer.0.SelfAttention"),
        f"{base}layers.{{layer}}.attention_output": ModulePoint(f"{block}.layer.0.SelfAttention.o"),
        f"{base}layers.{{layer}}.attention_residual": ModulePoint(f"{block}.{after_attention}.layer_norm", "input"),
        f"{base}layers.{{layer}}.mlp_norm": ModulePoint(f"{block}.layer.{mlp}.layer_norm"),
        f"{base}layers.{{layer}}.mlp_output": ModulePoint(f"{block}.layer.{mlp}.DenseReluDense.wo"),
        f"{base}layers.{{layer}}.residual": ModulePoint(block),
        f"{base}final_norm": ModulePoint(f"{stack}.final_layer_norm"),
    }


def _attention_points(prefix: str, module: str) -> dict[str, ModulePoint]:
    sides: tuple[Side, ...] = ("query", "key", "value")
    return {f"{prefix}{side}": ModulePoint(module, side) for side in sides}


_CROSS = "decoder.block.{layer}.layer"
POINTS = {
    **_stack_points("encoder", "encoder.", mlp=1, after_attention="layer.1"),
    **_stack_points("decoder", "", mlp=2, after_attention="layer.1"),
    "layers.{layer}.cross_attention_norm": ModulePoint(f"{_CROSS}.1.layer_norm"),
    **_attention_points("layers.{layer}.cross_", f"{_CROSS}.1.EncDecAttention"),
    "layers.{layer}.cross_attention_output": ModulePoint(f"{_CROSS}.1.EncDecAttention.o"),
    "layers.{layer}.cross_attention_residual": ModulePoint(f"{_CROSS}.2.layer_norm", "input"),
}


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a T5 config with the task's head."""
    relative = RelativeSpec(keys.relative_attention_num_buckets, keys.relative_attention_max_distance)

    def attention(*, causal: bool, relative: RelativeSpec | None) -> AttentionSpec:
        return AttentionSpec(
            heads=keys.num_heads,
            kv_heads=keys.num_heads,
            head_dim=keys.d_kv,
            scale=1.0,
            qkv_bias=False,
            output_bias=False,
            dropout=keys.dropout_rate,
            causal=causal,
            relative=relative,
        )

    encoder = EncoderSpec(
        attentions=(attention(causal=False, relative=relative),) * keys.num_layers,
        cross=attention(causal=False, relative=None),
    )
    return ModelSpec(
        vocab_size=keys.vocab_size,
        hidden_size=keys.d_model,
        max_positions=UNLIMITED_POSITIONS,
        norm=NormSpec("rms", keys.layer_norm_epsilon),
        attentions=(attention(causal=True, relative=relative),) * keys.num_decoder_layers,
        mlp=MlpSpec(keys.d_ff, keys.activation, gated=keys.gated, bias=False, dropout=keys.dropout_rate),
        learned_positions=False,
        tie_embeddings=keys.tie_word_embeddings,
        encoder=encoder,
        embedding_dropout=keys.dropout_rate,
        residual_dropout=keys.dropout_rate,
        final_dropout=keys.dropout_rate,
        head_scale=keys.d_model**-0.5 if keys.scale_decoder_outputs else None,
        head=HeadSpec(kind=task.head, outputs=keys.vocab_size),
    )


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a T5 model, in checkpoint order.  Initial deviations are those of transformers."""
    model = spec(keys, task)
    rule = partial(WeightRule, sizes=model.sizes)
    wide = Initializer("normal", keys.initializer_factor)
    tied = ("lm_head.weight",) if model.tie_embeddings else ()
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *tied)
    table = [
        rule("shared.weight", ("embed.embedding",), "vocab embed -> vocab embed", "embedding", wide, aliases=aliases),
        *_stack_rules(keys, model, "encoder", "encoder.", keys.num_layers),
        *_stack_rules(keys, model, "decoder", "", model.layers),
    ]
    if not model.tie_embeddings:
        table.append(rule("lm_head.weight", ("head.kernel",), "vocab embed -> embed vocab", "kernel", wide))
    return tuple(table)


def _stack_rules(keys: Keys, model: ModelSpec, stack: str, base: str, layers: int) -> list[WeightRule]:
    """One stack's.  base: what its Flax paths begin with."""
    factor, ones = keys.initializer_factor, Initializer("ones")
    narrow = Initializer("normal", factor * keys.d_model**-0.5)
    rule = partial(WeightRule, sizes=model.sizes)
    layer = partial(rule, layers=layers)
    at, path = f"{stack}.block.{{layer}}.layer", f"{base}layers"
    is_decoder = stack == "decoder"
    mlp = f"{at}.{2 if is_decoder else 1}"
    up, down = "mlp embed -> embed mlp", "embed mlp -> mlp embed"
    names = (("wi_0", "gate"), ("wi_1", "up")) if keys.gated else (("wi", "up"),)
    products = [
        layer(f"{mlp}.DenseReluDense.{name}.weight", (f"{path}.mlp.{to}.kernel",), up, "kernel", narrow) for name, to in names
    ]
    crossing = [
        *_attention_rules(keys, layer, f"{at}.1.EncDecAttention", f"{path}.cross_attention"),
        _norm_rule(layer, f"{at}.1.layer_norm", f"{path}.cross_attention_norm", ones),
    ]
    return [
        *_attention_rules(keys, layer, f"{at}.0.SelfAttention", f"{path}.attention"),
        rule(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{base}relative_bias.table.embedding",),
             "buckets heads -> buckets heads", "embedding", narrow),
        _norm_rule(layer, f"{at}.0.layer_norm", f"{path}.attention_norm", ones),
        *(crossing if is_decoder else ()),
        *products,
        layer(f"{mlp}.DenseReluDense.wo.weight", (f"{path}.mlp.down.kernel",), down, "kernel",
              Initializer("normal", factor * keys.d_ff**-0.5)),
        _norm_rule(layer, f"{mlp}.layer_norm", f"{path}.mlp_norm", ones),
        _norm_rule(rule, f"{stack}.final_layer_norm", f"{base}final_norm", ones),
    ]  # fmt: skip


def _attention_rules(keys: Keys, layer: Callable[..., WeightRule], name: str, path: str) -> list[WeightRule]:
    factor, size = keys.initializer_factor, keys.d_model
    inward = "(heads head_dim) embed -> embed heads head_dim"
    deviations = {"query": (size * keys.d_kv) ** -0.5, "key": size**-0.5, "value": size**-0.5}
    outward = Initializer("normal", factor * (keys.num_heads * keys.d_kv) ** -0.5)
    return [
        *(
            layer(f"{name}.{to[0]}.weight", (f"{path}.{to}.kernel",), inward, "kernel", Initializer("normal", factor * std))
            for to, std in deviations.items()
        ),
        layer(
            f"{name}.o.weight", (f"{path}.output.kernel",), "embed (heads head_dim) -> heads head_dim embed", "kernel", outward
        ),
    ]


def _norm_rule(make: Callable[..., WeightRule], name: str, path: str, init: Initializer) -> WeightRule:
    return make(f"{name}.weight", (f"{path}.scale",), "embed -> embed", "norm", init)
