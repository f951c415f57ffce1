"""What the layers of a Hugging Face model keep for their backward pass under PyTorch.

Letters: S keys of a row, E hidden, H heads, Q heads x head_dim, K key/value heads x head_dim, M MLP size, X experts, k of them
for each token, b bytes of the compute dtype.  For each token and layer:

    RMS norm           its input in float32, normalised and scaled: 4E + 2bE (3bE in fp32); LayerNorm: input and output, 2bE
    attention, sdpa    query, keys and values repeated for every head, output: 4bQ; where it takes a mask, that as numbers: b S
    sdpa with biases   of distances, which have gradients: queries, keys and values in float32, the softmax, 4 H S; attention
                       to a source, whose biases have none: their mask for every head, b H S
    attention, eager   the same and the softmax in float32, with a copy in the compute dtype: H S (4 + b), 4 H S in fp32
    MLP                input and output of the activation (relu: output); gated: also the other factor and the product
    experts            the rows of k experts: what they read and give, 2bE, and 4bM of the MLP; the router's softmax
"""

from __future__ import annotations

from jaxllm.families import Model
from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.planning.setting import Setting
from jaxllm.planning.stacks import Stack, stacks_of
from jaxllm.torch_backend.documents import goes_by_documents

# Tensors of the MLP's size that the backward pass of an activation needs.  Hugging Face writes `gelu_new` out in elementary
# operations, each of which saves its own factors; relu saves what it gives, which the next product keeps anyway; every other
# activation is one operation that saves its input.
_SAVED = {"gelu_new": 4, "gelu_fast": 4, "relu": 0}


def activation_bytes(model: Model, setting: Setting) -> float:
    """Bytes that all layers keep; with activation checkpointing what comes into each of them."""
    total = 0.0
    for stack in stacks_of(model.spec, setting):
        whole = setting.remat == "none"
        each = layer_bytes(model, setting, stack) if whole else stack.tokens * model.spec.hidden_size * setting.compute_bytes
        total += stack.layers * each
    return total


def working_bytes(model: Model, setting: Setting) -> float:
    """Bytes that one layer's backward pass works on: gradients of its largest tensors.

    With checkpointing also what it keeps, of which the MLP's last product has been let go by then.
    """
    spec, stacks = model.spec, stacks_of(model.spec, setting)
    inner = max(stack.tokens for stack in stacks) * setting.compute_bytes * spec.mlp.size / setting.parallel.tensor
    if setting.remat == "none":
        return (4.0 if spec.mlp.gated else 2.0) * inner
    return (2.0 if spec.mlp.gated else 1.0) * inner + max(layer_bytes(model, setting, stack) for stack in stacks)


def layer_bytes(model: Model, setting: Setting, stack: Stack) -> float:
    """Bytes that one layer keeps."""
    spec = model.spec
    norms = ((4 if spec.norm.place == "sandwich" else 2) + (stack.source is not None)) * norm_bytes(spec, setting)
    kept = stack.tokens * (norms + _mlp_bytes(model, setting) + _dropout_bytes(spec, setting))
    kept += _attention_bytes(spec, setting, stack.attention, stack.tokens, stack.tokens, stack.length)
    if stack.source is not None and spec.encoder is not None:
        keys = float(setting.source_tokens)
        kept += _attention_bytes(spec, setting, spec.encoder.cross, stack.tokens, keys, stack.source)
    return kept


def norm_bytes(spec: ModelSpec, setting: Setting) -> float:
    """Bytes a token's norm saves."""
    width = setting.compute_bytes
    if spec.norm.kind == "layer":
        return 2.0 * width * spec.hidden_size
    return (max(width, 4) + 2.0 * width) * spec.hidden_size


def _attention_bytes(
    spec: ModelSpec, setting: Setting, attention: AttentionSpec, tokens: float, key_tokens: float, keys: int
) -> float:
    width, tensor = setting.compute_bytes, setting.parallel.tensor
    heads = attention.heads / tensor
    query, key = heads * attention.head_dim, attention.kv_heads * attention.head_dim / tensor
    kept = 2.0 * width * (tokens + key_tokens) * query
    if setting.attention == "sdpa" and spec.encoder is not None:
        if attention.relative is None:
            return kept + tokens * heads * (width * keys + 4.0)
        return tokens * ((12.0 + width) * query + 4.0 * heads * keys)
    if setting.attention == "eager":
        kept += tokens * heads * keys * (4.0 if width == 4 else 4.0 + width)
    elif not goes_by_documents(spec, setting.attention, setting.target or setting.sequence):
        kept += tokens * (width * keys + 4.0 * heads)
    if attention.query_key_norm:
        kept += (4.0 + width) * (tokens * query + key_tokens * key)
    return kept


def _mlp_bytes(model: Model, setting: Setting) -> float:
    """For each token."""
    keys, mlp, width = model.huggingface_config, model.spec.mlp, setting.compute_bytes
    name = str(keys.get("activation_function") or keys.get("hidden_act") or keys.get("feed_forward_proj") or "")
    saved = _SAVED.get("gelu_new" if name == "gated-gelu" else name, 1)  # T5's gated gelu is that one
    inner = (saved + 1 + (2 if mlp.gated else 0)) * width * mlp.size / setting.parallel.tensor
    if mlp.experts is None:
        return inner
    return mlp.experts.per_token * (inner + 2 * width * model.spec.hidden_size) + 4.0 * mlp.experts.count


def _dropout_bytes(spec: ModelSpec, setting: Setting) -> float:
    """What was dropped, for each of the two residual branches."""
    return 2.0 * setting.compute_bytes * spec.hidden_size if spec.residual_dropout else 0.0
