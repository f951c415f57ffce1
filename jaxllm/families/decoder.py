"""Weight rules and points of decoders of Llama's kind: attention and a gated MLP, each beside norms, in every layer.

Their transformers classes name all weights alike; families differ in which norms a layer has, and where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeAlias

from jaxllm.families.initialization import Initializer
from jaxllm.families.points import ModulePoint
from jaxllm.families.spec import ModelSpec
from jaxllm.families.weights import WeightRule


def architectures(name: str, *, words: bool = True) -> dict[str, str]:
    """The transformers classes of a decoder whose classes begin with `name`.  words: whether it has a token classifier."""
    heads = {"causal-lm": "CausalLM", "sequence-classification": "SequenceClassification"}
    heads |= {"token-classification": "TokenClassification"} if words else {}
    return {head: f"{name}For{ending}" for head, ending in heads.items()}


Pieces: TypeAlias = Mapping[str, tuple[str, ...]]

BASE_PREFIX = "model."
LAYER = "model.layers.{layer}"
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
OUTPUT_NORMS = {"post_attention_layernorm": "attention_output_norm", "post_feedforward_layernorm": "mlp_output_norm"}
SANDWICH_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}
"""Norms of a layer in the order of the checkpoint: their Hugging Face names and what they are here (`NormPlace`)."""


class LayerRule(Protocol):
    """WeightRule with its sizes and layers filled in."""

    def __call__(
        self, name: str, paths: tuple[str, ...], pattern: str, kind: str, init: Initializer, /
    ) -> WeightRule:  # pragma: no cover - a signature
        """A rule for the weight of every layer."""
        ...


def decoder_points(norms: Mapping[str, str], *, experts: bool = False) -> dict[str, ModulePoint]:
    """`POINTS` of a decoder whose layers have these norms, and perhaps experts behind a router."""
    at = {ours: f"{LAYER}.{theirs}" for theirs, ours in norms.items()}
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    return {
        "embedding": ModulePoint("model.layers.0", "input"),
        **{f"layers.{{layer}}.{ours}": ModulePoint(module) for ours, module in at.items()},
        "layers.{layer}.query": ModulePoint(attention, "query"),
        "layers.{layer}.key": ModulePoint(attention, "key"),
        "layers.{layer}.value": ModulePoint(attention, "value"),
        "layers.{layer}.attention_output": ModulePoint(f"{attention}.o_proj"),
        "layers.{layer}.attention_residual": ModulePoint(at.get("mlp_norm", mlp), "input"),
        **({"layers.{layer}.router": ModulePoint(f"{mlp}.gate")} if experts else {}),
        "layers.{layer}.mlp_output": ModulePoint(mlp),
        "layers.{layer}.residual": ModulePoint(LAYER),
        "final_norm": ModulePoint("model.norm"),
    }


def decoder_rules(
    model: ModelSpec, std: float, norms: Mapping[str, str], *, fused: bool = False, experts: Pieces | None = None
) -> tuple[WeightRule, ...]:
    """Every weight, in checkpoint order.

    std: of the normal distribution that kernels and embeddings start from.  norms: of a layer.  fused: whether query, key and
    value, and gate and up, are one tensor each.  experts: `WeightRule.pieces` of their `router`, `gate_up` and `down`.
    """
    normal, scale = Initializer("normal", std), Initializer("zeros" if model.norm.unit_offset else "ones")
    embedding = Initializer("normal", std, zero_row=model.padding_token)
    rule = partial(WeightRule, sizes=model.sizes)
    layer = partial(rule, layers=model.layers)
    in_layer = {ours: layer(f"{LAYER}.{theirs}.weight", (f"layers.{ours}.scale",), "embed -> embed", "norm", scale)
                for theirs, ours in norms.items()}  # fmt: skip
    before_mlp = [name for name in ("attention_output_norm", "mlp_norm") if name in in_layer]
    table = [
        rule("model.embed_tokens.weight", ("embed.embedding",), "vocab embed -> vocab embed", "embedding", embedding,
             aliases=tied_head(model)),
        *([in_layer["attention_norm"]] if "attention_norm" in in_layer else []),
        *_attention(layer, normal, fused=fused),
        *_query_key_norms(model, layer, scale),
        *(in_layer[name] for name in before_mlp),
        *(_mlp(layer, normal, fused=fused) if experts is None else _experts(layer, normal, experts)),
        *([in_layer["mlp_output_norm"]] if "mlp_output_norm" in in_layer else []),
        rule("model.norm.weight", ("final_norm.scale",), "embed -> embed", "norm", scale),
        *_biases(model, layer),
    ]  # fmt: skip
    return (*table, *head_rules(model, normal, classifier="score"))


def tied_head(model: ModelSpec) -> tuple[str, ...]:
    """The name of a decoder's head where that is its token embedding."""
    return ("lm_head.weight",) if model.tie_embeddings and model.head.kind == "causal-lm" else ()


def head_rules(model: ModelSpec, normal: Initializer, *, classifier: str) -> list[WeightRule]:
    """What a decoder's head has of its own.  classifier: name of a token classifier's output layer."""
    rule = partial(WeightRule, sizes=model.sizes)
    if model.head.kind == "causal-lm":
        own = rule("lm_head.weight", ("head.kernel",), "vocab embed -> embed vocab", "kernel", normal)
        return [] if model.tie_embeddings else [own]
    name = "score" if model.head.kind == "sequence-classification" else classifier
    table = [rule(f"{name}.weight", ("head.output.kernel",), "label embed -> embed label", "kernel", normal)]
    if model.head.bias:
        table.append(rule(f"{name}.bias", ("head.output.bias",), "label -> label", "bias", Initializer("zeros")))
    return table


_HEADS = "(heads head_dim) embed -> embed heads head_dim"
_KV_HEADS = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
_AT, _TO = f"{LAYER}.self_attn", "layers.attention"
_MLP, _MLP_TO = f"{LAYER}.mlp", "layers.mlp"


def _attention(layer: LayerRule, normal: Initializer, *, fused: bool) -> list[WeightRule]:
    output = layer(f"{_AT}.o_proj.weight", (f"{_TO}.output.kernel",),
                   "embed (heads head_dim) -> heads head_dim embed", "kernel", normal)  # fmt: skip
    if fused:
        paths = (f"{_TO}.query.kernel", f"{_TO}.key.kernel", f"{_TO}.value.kernel")
        pattern = f"{_HEADS} | {_KV_HEADS} | {_KV_HEADS}"
        return [output, layer(f"{_AT}.qkv_proj.weight", paths, pattern, "kernel", normal)]
    return [
        layer(f"{_AT}.q_proj.weight", (f"{_TO}.query.kernel",), _HEADS, "kernel", normal),
        layer(f"{_AT}.k_proj.weight", (f"{_TO}.key.kernel",), _KV_HEADS, "kernel", normal),
        layer(f"{_AT}.v_proj.weight", (f"{_TO}.value.kernel",), _KV_HEADS, "kernel", normal),
        output,
    ]


def _query_key_norms(model: ModelSpec, layer: LayerRule, scale: Initializer) -> list[WeightRule]:
    over = model.attention.query_key_norm
    if over is None:
        return []
    patterns = ("head_dim -> head_dim",) * 2 if over == "head" else (
        "(heads head_dim) -> heads head_dim", "(kv_heads head_dim) -> kv_heads head_dim"
    )  # fmt: skip
    return [
        layer(f"{_AT}.q_norm.weight", (f"{_TO}.query_norm.scale",), patterns[0], "norm", scale),
        layer(f"{_AT}.k_norm.weight", (f"{_TO}.key_norm.scale",), patterns[1], "norm", scale),
    ]


def _mlp(layer: LayerRule, normal: Initializer, *, fused: bool) -> list[WeightRule]:
    down = layer(f"{_MLP}.down_proj.weight", (f"{_MLP_TO}.down.kernel",), "embed mlp -> mlp embed", "kernel", normal)
    if fused:
        paths = (f"{_MLP_TO}.gate.kernel", f"{_MLP_TO}.up.kernel")
        return [layer(f"{_MLP}.gate_up_proj.weight", paths, "(two mlp) embed -> two embed mlp", "kernel", normal), down]
    return [
        layer(f"{_MLP}.gate_proj.weight", (f"{_MLP_TO}.gate.kernel",), "mlp embed -> embed mlp", "kernel", normal),
        layer(f"{_MLP}.up_proj.weight", (f"{_MLP_TO}.up.kernel",), "mlp embed -> embed mlp", "kernel", normal),
        down,
    ]


def _experts(layer: LayerRule, normal: Initializer, pieces: Pieces) -> list[WeightRule]:
    paths, at = (f"{_MLP_TO}.gate.kernel", f"{_MLP_TO}.up.kernel"), f"{_MLP}.experts"
    router = layer(f"{_MLP}.gate.weight", (f"{_MLP_TO}.router.kernel",), "router embed -> embed router", "kernel", normal)
    inward = layer(f"{at}.gate_up_proj", paths, "experts (two mlp) embed -> two experts embed mlp", "kernel", normal)
    outward = layer(f"{at}.down_proj", (f"{_MLP_TO}.down.kernel",), "experts embed mlp -> experts mlp embed", "kernel", normal)
    named = {"router": router, "gate_up": inward, "down": outward}
    return [replace(each, pieces=pieces.get(name, ())) for name, each in named.items()]


def _biases(model: ModelSpec, layer: LayerRule) -> list[WeightRule]:
    zeros, table = Initializer("zeros"), []
    if model.attention.qkv_bias:
        kv_heads = "(kv_heads head_dim) -> kv_heads head_dim"
        table += [
            layer(f"{_AT}.q_proj.bias", (f"{_TO}.query.bias",), "(heads head_dim) -> heads head_dim", "bias", zeros),
            layer(f"{_AT}.k_proj.bias", (f"{_TO}.key.bias",), kv_heads, "bias", zeros),
            layer(f"{_AT}.v_proj.bias", (f"{_TO}.value.bias",), kv_heads, "bias", zeros),
        ]
    if model.attention.output_bias:
        table.append(layer(f"{_AT}.o_proj.bias", (f"{_TO}.output.bias",), "embed -> embed", "bias", zeros))
    if model.mlp.bias:
        table += [
            layer(f"{_MLP}.gate_proj.bias", (f"{_MLP_TO}.gate.bias",), "mlp -> mlp", "bias", zeros),
            layer(f"{_MLP}.up_proj.bias", (f"{_MLP_TO}.up.bias",), "mlp -> mlp", "bias", zeros),
            layer(f"{_MLP}.down_proj.bias", (f"{_MLP_TO}.down.bias",), "embed -> embed", "bias", zeros),
        ]
    return table
