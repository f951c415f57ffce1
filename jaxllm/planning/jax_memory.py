"""Memory of one device under JAX: arguments of the compiled step and what XLA keeps beside them.

What the forward pass saves is decided by JAX before XLA sees the program, and was read from the jaxpr: the outputs of the scan
over layers.  What XLA adds (gathered weights, one layer's working set, copies of the logits) was read from its buffer
assignments.  Letters: T tokens of a micro-batch on one device, S sequence, E hidden, H heads, Q heads x head_dim, K key/value
heads x head_dim, M MLP size, V vocabulary, b bytes of the compute dtype.  Saved for each token and layer:

| remat | RMS norm, each | LayerNorm, each | attention | MLP |
|---|---|---|---|---|
| none | 2bE + 4E | bE + 8E | 2bQ + 2bK + 8H + (4 + b) H S; splash, cudnn: 3bQ + 2bK + 4H | 6bM |
| dots | bE | bE | bQ + 2bK | 2bM, plain bM |
| full | bE for the whole layer | | | |
| names, offload | the points that are named | | | |

The axes divide them: `context` T, `tensor` H, Q, K, M, V and, along the sequence, what has E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.remat import REMAT_POINTS, kept_points
from jaxllm.families import Model
from jaxllm.families.spec import ModelSpec
from jaxllm.planning.deepspeed_memory import norms
from jaxllm.planning.memory import Memory, moment
from jaxllm.planning.setting import Setting, axes_of, cut_elements

Platform = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True)
class _Compiler:
    """What a platform's compiler does.

    logits: copies of the logits that are alive together.  logit_bytes: of an element, where it is not the compute dtype.
    layer_copies: copies of the layers' weights, transposed for the products.
    """

    logits: float
    logit_bytes: float | None
    layer_copies: float


# XLA:TPU (and XLA:GPU, which is taken to be like it) fuses the loss into one pass over the logits and keeps them beside their
# gradient, both in the compute dtype.  XLA:CPU keeps the logits, their exponentials and the gradient, always in float32, and
# copies the layers' weights transposed, for both passes.
_COMPILERS: dict[Platform, _Compiler] = {
    "tpu": _Compiler(2.0, None, 0.0),
    "gpu": _Compiler(2.0, None, 0.0),
    "cpu": _Compiler(3.0, 4.0, 2.0),
}


@dataclass(frozen=True)
class _Counts:
    """Elements on one device."""

    all: float
    layers: float
    table: float
    whole_layer: float
    whole_table: float


def jax_memory(model: Model, setting: Setting, platform: Platform = "tpu") -> Memory:
    """Memory of one device, at the moments of a step that can be the fullest."""
    spec, width, parallel = model.spec, setting.compute_bytes, setting.parallel
    counts, compiler = _counts(model, setting), _COMPILERS[platform]
    master, tokens = setting.master_bytes, float(setting.tokens)
    state = {"parameters": master * counts.all, "moments": 2.0 * master * counts.all}
    batch = 5 * 4.0 * tokens * setting.accumulation
    host = 0.0
    if setting.offload_optimizer != "none":
        host, state["moments"] = state["moments"], 0.0
    if setting.offload_optimizer == "all":
        host, state["parameters"] = host + state["parameters"], 0.0
    # Weights as they are used: all of them are cast before the first layer.
    cast = width * counts.all if width != master else 0.0
    # Weights that are cut are gathered within the loop over layers, so that only the backward pass's copy is made before it.
    is_cut = parallel.fsdp * parallel.tensor > 1
    layer_copies = min(compiler.layer_copies, 1.0) if is_cut else compiler.layer_copies
    copies = layer_copies * max(width, compiler.logit_bytes or 0) * counts.layers
    accumulated = master * counts.all if setting.accumulation > 1 else 0.0
    on_device, on_host = saved_bytes(spec, setting)
    saved = tokens * spec.layers * on_device
    host += tokens * spec.layers * on_host
    gathers = parallel.fsdp > 1
    table = width * counts.whole_table if gathers else 0.0
    # This layer and the next; XLA:CPU, which cannot reduce and scatter at once, has a layer's whole gradient as well.
    layer = (3 if platform == "cpu" else 2) * width * counts.whole_layer if gathers else 0.0
    logit = compiler.logit_bytes or width
    chunk = setting.chunk(spec, tpu=platform == "tpu")
    logits = compiler.logits * logit * (tokens if chunk is None else chunk) * -(-spec.outputs // parallel.tensor)
    chunked = 0.0 if chunk is None else _chunked_bytes(spec, setting, platform)
    working = tokens * working_bytes(spec, setting)
    # Between the products residuals are split over `tensor`; for each product the hidden states of all tokens come together,
    # and their gradients do: so many copies are alive at the head and in a layer (Llama 70B and 405B over tensor 4).
    together = tokens * spec.hidden_size * width if parallel.tensor > 1 else 0.0
    held = {**state, "activations": saved}
    gradients = width * counts.layers
    tables = width * counts.table
    return Memory(
        [
            moment("the loss", **held, gradients=accumulated + tables, logits=logits, weights_in_use=cast + copies + table,
                   working=batch + 7.0 * together + chunked),
            moment("the first layer that goes backward", **held, gradients=accumulated + gradients + tables,
                   weights_in_use=cast + copies + layer, working=batch + working + 3.5 * together),
            moment("the end of the backward pass", **state, gradients=accumulated + gradients + 2 * tables,
                   weights_in_use=cast + copies + table, working=batch + 2.0 * tokens * spec.hidden_size * width),
            moment("the update", **state, gradients=accumulated + gradients + tables, working=batch),
        ],
        host,
    )  # fmt: skip


def _chunked_bytes(spec: ModelSpec, setting: Setting, platform: Platform) -> float:
    """What a loss in chunks makes in the forward pass: the gradients of the hidden states and, over all chunks, of the head.

    XLA:CPU has a chunk's part of the head's gradient in a buffer of its own before it is added.
    """
    head = -(-spec.vocab_size // setting.parallel.tensor) * spec.hidden_size * (2 if platform == "cpu" else 1)
    return setting.master_bytes * head + float(setting.tokens) * spec.hidden_size * setting.compute_bytes


def _counts(model: Model, setting: Setting) -> _Counts:
    parallel = setting.parallel
    held = [(rule, cut_elements(rule, parallel.fsdp, parallel.tensor, parallel.expert)) for rule in model.rules]
    gathered = [(rule, cut_elements(rule, 1, parallel.tensor, parallel.expert)) for rule in model.rules]
    return _Counts(
        all=float(sum(size for _, size in held)),
        layers=float(sum(size for rule, size in held if rule.layers)),
        table=float(sum(size for rule, size in held if not rule.layers)),
        whole_layer=sum(size / rule.layers for rule, size in gathered if rule.layers),
        whole_table=float(max(size for rule, size in gathered if "vocab" in axes_of(rule))),
    )


def saved_bytes(spec: ModelSpec, setting: Setting) -> tuple[float, float]:
    """Bytes that one layer saves for its backward pass, for each token of a device: on the device, and in the host's memory."""
    width, tensor = setting.compute_bytes, setting.parallel.tensor
    wide = max(width, 4)
    hidden = spec.hidden_size / tensor  # residuals and norms are split over the sequence there
    heads = spec.attention.heads / tensor
    query, key = heads * spec.attention.head_dim, spec.attention.kv_heads * spec.attention.head_dim / tensor
    inner = spec.mlp.size / tensor
    if setting.remat == "full":
        return width * hidden, 0.0
    if setting.remat == "dots":
        return width * (2 * hidden + query + 2 * key + (2 if spec.mlp.gated else 1) * inner), 0.0
    kept = kept_points(setting.remat) if setting.remat != "none" else None
    if kept is not None:
        sizes = _point_sizes(spec, hidden, query, key, inner)
        device = {*kept.device} | ({"layer_input"} - {*kept.host})
        return width * sum(sizes[name] for name in device), width * sum(sizes[name] for name in kept.host)
    norm = (2 * width + wide) * hidden if spec.norm.kind == "rms" else (width + 2 * wide) * hidden
    if setting.attention == "xla":
        attention = 2 * width * query + 2 * width * key + 2 * wide * heads + (wide + width) * heads * setting.sequence
    else:
        attention = 3 * width * query + 2 * width * key + wide * heads
    return norms(spec) * norm + attention + 6 * width * inner, 0.0


def _point_sizes(spec: ModelSpec, hidden: float, query: float, key: float, inner: float) -> dict[str, float]:
    """Elements of each point of a layer (`jaxllm.config.remat.REMAT_POINTS`), for each token of a device."""
    sizes = dict.fromkeys(REMAT_POINTS, hidden)
    gate = inner if spec.mlp.gated else 0.0
    return {
        **sizes,
        "query": query,
        "key": key,
        "value": key,
        "attention_mixed": query,
        "mlp_gate": gate,
        "mlp_up": inner,
        "mlp_inner": inner,
    }


def working_bytes(spec: ModelSpec, setting: Setting) -> float:
    """Bytes that one layer's backward pass works on, for each token: what it recomputes, and gradients of that."""
    width, tensor = setting.compute_bytes, setting.parallel.tensor
    heads = spec.attention.heads / tensor
    query, inner = heads * spec.attention.head_dim, spec.mlp.size / tensor
    mlp = (3 if spec.mlp.gated else 2) * width * inner
    attention = 6 * width * query
    if setting.attention == "xla":
        attention += 3 * 4.0 * heads * setting.sequence
    return max(mlp, attention) + 4 * width * spec.hidden_size
