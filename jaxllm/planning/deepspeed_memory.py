"""Memory of one process under DeepSpeed: what PyTorch's allocator hands out for the Hugging Face model of a run.

Derived from what the code keeps alive, not fitted: every term below was found among the live allocations at the peak of a real
run (`python -m benchmarks.planner --deepspeed` measures with torch's own accounting of allocations).  Letters: P parameters, n
processes that share optimiser state, T tokens of a micro-batch on one process, S sequence, E hidden, Q heads x head_dim, M MLP
size, V vocabulary, b bytes of the compute dtype, R DeepSpeed's bucket of gradients.

What stays between the steps (bytes; p and m, v in float32):

    stage 0            4P + 8P, and 2P for the model that computes in bf16
    stage 1, 2         bP + 4P/n + 8P/n; stage 1 in bf16 also the whole gradient in float32, 4P
    stage 3            bP/n + 4P/n + 8P/n + the gradient's part 4P/n + 4R

What a layer saves for its backward pass, for each token, without activation checkpointing:

    RMS norm           its input in float32, normalised and scaled: 4E + 2bE (3bE in fp32); LayerNorm: input and output, 2bE
    attention, sdpa    query, keys and values repeated for every head, output: 4bQ; the mask as numbers to add: b S
    attention, eager   the same and the softmax in float32, with a copy in the compute dtype: H S (4 + b), 4 H S in fp32
    MLP                input and output of the activation; gated: also the other factor and the product
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxllm.families import Model
from jaxllm.families.spec import ModelSpec
from jaxllm.planning.memory import Memory, Moment, moment
from jaxllm.planning.setting import Setting, axes_of

BUCKET = 200_000_000
"""Elements of `reduce_bucket_size` in the DeepSpeed config that jaxllm writes."""

FLAT_REDUCTION = 500_000_000
"""Elements that DeepSpeed reduces at a time at stage 0 and, in bf16, 1 (its `elements_per_buffer`)."""

LIVE_PARAMETERS = 1_000_000_000
"""Elements of `stage3_max_live_parameters`: gathered weights that stage 3 keeps."""

SUB_GROUP = 1_000_000_000
"""Elements of `sub_group_size`: stage 3 updates that many at a time."""

# Tensors of the MLP's size that the backward pass of an activation needs.  Hugging Face writes `gelu_new` out in elementary
# operations, each of which saves its own factors; every other activation is one operation that saves its input.
_COMPOSED = {"gelu_new": 4, "gelu_fast": 4}


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what the moments are made of.  chunked: what a loss in chunks makes beside logits."""

    parameters: float
    model: float
    masters: float
    moments: float
    gradients: float
    activations: float
    layer: float
    logits: float
    chunked: float
    head: float


def deepspeed_memory(model: Model, setting: Setting, *, cuda: bool = True) -> Memory:
    """Memory of one process, at the moments of a step that can be the fullest.

    cuda: on a GPU torch's AdamW works on all tensors at once and holds the roots of all second moments for it.
    """
    sizes = _sizes(model, setting)
    stage = setting.zero_stage
    bucket = bucket_bytes(setting)
    kept = _kept_between_steps(sizes, setting)
    carried = _carried_gradients(sizes, setting)
    host = 0.0
    if setting.offload_optimizer != "none":
        host = sizes.masters + sizes.moments + sizes.parameters * 4 / _shards(setting)
    # A process that is alone holds the whole weights already.
    gathered = min(sizes.model, LIVE_PARAMETERS * setting.compute_bytes) if stage == 3 and _shards(setting) > 1 else 0.0
    whole = {"parameters": kept[0], "moments": kept[1]}
    forward = {**whole, "weights_in_use": gathered, "activations": sizes.activations}
    early = bucket if stage == 3 else 0.0
    working = 2.0 * sizes.layer if setting.remat == "none" else sizes.layer
    moments = [
        moment("the loss", **forward, gradients=kept[2] + carried, logits=sizes.logits, buffers=early, working=sizes.chunked),
        moment(
            "the first layer that goes backward",
            **forward,
            gradients=kept[2] + carried + sizes.head,
            buffers=bucket,
            working=working,
        ),
        _reduction(sizes, setting, whole, kept[2], carried, gathered),
    ]
    moments.append(_update(sizes, setting, whole, kept[2], cuda=cuda))
    return Memory(moments, host)


def _logits_bytes(spec: ModelSpec, setting: Setting) -> float:
    """The log-softmax, its gradient and the loss's, in float32; the logits themselves have gone by then.

    A chunk's gradient is written over its logits; beside them are their exponentials, of which the softmax's totals are made.
    """
    chunk = setting.chunk(spec)
    copies, tokens = (3.0, setting.tokens) if chunk is None else (2.0, chunk)
    return copies * 4.0 * tokens * spec.outputs


def _chunked_bytes(spec: ModelSpec, setting: Setting) -> float:
    """The gradients of the hidden states and, over all chunks in float32, of the head, with a chunk's part in bf16."""
    width = setting.compute_bytes
    head = (4.0 if width == 4 else 4.0 + width) * spec.vocab_size * spec.hidden_size
    return head + width * setting.tokens * spec.hidden_size


def _shards(setting: Setting) -> int:
    """Processes that share optimiser state."""
    return setting.groups * setting.parallel.context


def bucket_bytes(setting: Setting) -> float:
    """Bytes of DeepSpeed's gradient bucket."""
    if setting.zero_stage == 0 or (setting.zero_stage == 1 and setting.precision == "bf16"):
        return 0.0
    return BUCKET * (4.0 if setting.zero_stage == 3 else setting.compute_bytes)


def _sizes(model: Model, setting: Setting) -> _Sizes:
    tensor = setting.parallel.tensor
    parameters = float(sum(torch_elements(rule.parameters, axes_of(rule), tensor) for rule in model.rules))
    shards = _shards(setting) if setting.zero_stage else 1
    spec, tokens = model.spec, float(setting.tokens)
    layer = tokens * layer_bytes(model, setting)
    saved = layer if setting.remat == "none" else tokens * spec.hidden_size * setting.compute_bytes
    last = tokens * (norm_bytes(spec, setting) + 8.0 * 3)  # and tokens, positions and targets
    mask = setting.micro_batch * setting.sequence**2 * (1 if setting.attention == "sdpa" else setting.compute_bytes)
    return _Sizes(
        parameters=parameters,
        model=parameters * setting.compute_bytes,
        masters=4.0 * parameters / shards,
        moments=8.0 * parameters / shards,
        gradients=4.0 * parameters,
        activations=spec.layers * saved + last + mask,
        layer=layer if setting.remat != "none" else tokens * 2 * setting.compute_bytes * (spec.mlp.size / tensor),
        logits=_logits_bytes(spec, setting),
        chunked=0.0 if setting.chunk(spec) is None else _chunked_bytes(spec, setting),
        head=0.0 if spec.tie_embeddings else 4.0 * spec.outputs * spec.hidden_size,
    )


def torch_elements(elements: int, axes: frozenset[str], tensor: int) -> float:
    """Elements of a weight on one process: AutoTP cuts the layers' matrices, and neither embeddings nor the output head."""
    cut = "vocab" not in axes and bool({"heads", "kv_heads", "mlp"} & axes)
    return elements / tensor if cut else elements


def _kept_between_steps(sizes: _Sizes, setting: Setting) -> tuple[float, float, float]:
    """Bytes of weights and masters, of moments, and of gradients that are there all the time."""
    stage, bf16 = setting.zero_stage, setting.precision == "bf16"
    masters = 0.0 if setting.offload_optimizer != "none" else sizes.masters
    moments = 0.0 if setting.offload_optimizer != "none" else sizes.moments
    if stage == 0:
        return masters + (sizes.model if bf16 else 0.0), moments, 0.0
    if stage < 3:
        return sizes.model + masters, moments, sizes.gradients if stage == 1 and bf16 else 0.0
    part = sizes.gradients / _shards(setting)
    model = 0.0 if setting.offload_param else sizes.model / _shards(setting)
    return model + masters, moments, 0.0 if setting.offload_optimizer != "none" else part


def _carried_gradients(sizes: _Sizes, setting: Setting) -> float:
    """Bytes of gradients that earlier micro-batches of a step have left."""
    stage = setting.zero_stage
    if setting.accumulation == 1 or stage == 3 or (stage == 1 and setting.precision == "bf16"):
        return 0.0
    return sizes.gradients if stage < 2 else sizes.gradients / _shards(setting)


def _reduction(
    sizes: _Sizes, setting: Setting, whole: dict[str, float], gradients: float, carried: float, gathered: float
) -> Moment:
    """The end of the last backward pass: all gradients are there and are added up over the processes."""
    stage, bf16 = setting.zero_stage, setting.precision == "bf16"
    at_once = 4.0 * min(sizes.parameters, FLAT_REDUCTION if stage < 2 and not bucket_bytes(setting) else BUCKET)
    part = sizes.gradients / _shards(setting)
    if stage == 0:
        gradients, buffers = sizes.gradients, at_once
    elif stage == 1 and bf16:
        gradients, buffers = gradients + sizes.model, at_once
    else:
        # In bf16 the bucket's gradients are there three times: as autograd made them, in float32, and this process's part.
        more = part + setting.compute_bytes * min(sizes.parameters, BUCKET) if bf16 else part if stage == 3 else carried
        gradients, buffers = gradients + more, bucket_bytes(setting) + at_once
    named = f"adding gradients up over {setting.groups} processes" if setting.groups > 1 else "the end of the backward pass"
    return moment(named, **whole, gradients=gradients, weights_in_use=gathered, buffers=buffers)


def _update(sizes: _Sizes, setting: Setting, whole: dict[str, float], gradients: float, *, cuda: bool) -> Moment:
    """The optimiser's step: from stage 1 on the gradient's part, flat, beside the pieces it is made from."""
    buffers = bucket_bytes(setting) if setting.zero_stage == 3 else 0.0
    if setting.offload_optimizer != "none":
        return moment("the update", **whole, gradients=gradients, buffers=buffers)
    part = sizes.gradients / _shards(setting) if setting.zero_stage else sizes.gradients
    pieces = part if setting.zero_stage else 0.0
    roots = min(sizes.moments / 2, 4.0 * SUB_GROUP if setting.zero_stage == 3 else math.inf) if cuda else 0.0
    return moment("the update", **whole, gradients=max(gradients, part) + pieces, buffers=buffers, working=roots)


def norm_bytes(spec: ModelSpec, setting: Setting) -> float:
    """Bytes a token's norm saves."""
    width = setting.compute_bytes
    if spec.norm.kind == "layer":
        return 2.0 * width * spec.hidden_size
    return (max(width, 4) + 2.0 * width) * spec.hidden_size


def layer_bytes(model: Model, setting: Setting) -> float:
    """Bytes that one layer of the Hugging Face model saves for its backward pass, for each token of a process."""
    spec, width, tensor = model.spec, setting.compute_bytes, setting.parallel.tensor
    heads = spec.attention.heads / tensor
    query = heads * spec.attention.head_dim
    attention = 4.0 * width * query
    if setting.attention == "sdpa":
        attention += width * setting.sequence + 4.0 * heads
    else:
        scores = 4.0 if width == 4 else 4.0 + width
        attention += heads * setting.sequence * scores
    if getattr(spec.attention, "query_key_norm", None):
        attention += (4.0 + width) * (query + spec.attention.kv_heads * spec.attention.head_dim / tensor)
    return norms(spec) * norm_bytes(spec, setting) + attention + _mlp_bytes(model, setting) + _dropout_bytes(spec, setting)


def norms(spec: ModelSpec) -> int:
    """Norms in a layer: before attention and MLP, after them, or both."""
    place: str = spec.norm.place
    return 4 if place == "sandwich" else 2


def _mlp_bytes(model: Model, setting: Setting) -> float:
    """Gated: gate, activated gate, up and their product; plain: what the activation needs and what it gives."""
    keys = model.huggingface_config
    name = str(keys.get("activation_function") or keys.get("hidden_act") or "")
    inner = _COMPOSED.get(name, 1) + 1 + (2 if model.spec.mlp.gated else 0)
    return inner * setting.compute_bytes * model.spec.mlp.size / setting.parallel.tensor


def _dropout_bytes(spec: ModelSpec, setting: Setting) -> float:
    """What was dropped, for each of the two residual branches."""
    return 2.0 * setting.compute_bytes * spec.hidden_size if spec.residual_dropout else 0.0
