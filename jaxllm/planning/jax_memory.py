"""Memory of one device under JAX: arguments of the compiled step and what XLA keeps beside them.

What the forward pass keeps is in `jaxllm.planning.jax_activations`.  What XLA adds (gathered weights, copies of the logits) was
read from its buffer assignments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxllm.families import Model
from jaxllm.families.spec import ModelSpec
from jaxllm.families.weights import WeightRule
from jaxllm.planning.jax_activations import saved_bytes, working_bytes
from jaxllm.planning.memory import Memory, moment
from jaxllm.planning.setting import Setting, axes_of, shards_of
from jaxllm.planning.stacks import stacks_of

Platform = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True)
class _Compiler:
    """What a platform's compiler does.

    logits: copies of the logits that are alive together; chunk_logits: of a chunk's.  logit_bytes: of an element, where it is
    not the compute dtype.
    scores: arrays of attention's scores in float32 that the backward pass of a layer holds together.  tiles: the last two
    dimensions of an array are filled up to multiples of these in memory.
    """

    logits: float
    chunk_logits: float
    logit_bytes: float | None
    scores: int
    tiles: tuple[int, int] = (1, 1)


# XLA:TPU (and XLA:GPU, which is taken to be like it) fuses the loss into one pass over the logits and keeps them beside their
# gradient, both in the compute dtype; of a chunk it makes the gradient twice, within each of its two products.  Of attention
# that is written out, scores less their largest are what is left, the rest is fused into products.  XLA:CPU keeps the logits,
# their exponentials and the gradient, always in float32, and scores likewise.
_COMPILERS: dict[Platform, _Compiler] = {
    "tpu": _Compiler(2.0, 1.0, None, 1, (8, 128)),
    "gpu": _Compiler(2.0, 1.0, None, 1),
    "cpu": _Compiler(3.0, 3.0, 4.0, 3),
}


@dataclass(frozen=True)
class _Counts:
    """Elements on one device.  padding: what tiles add to the copies in the compute dtype; copied: to tables, see `_copied`."""

    all: float
    padding: float
    copied: float
    layers: float
    table: float
    whole_layer: float
    whole_table: float


def jax_memory(model: Model, setting: Setting, platform: Platform = "tpu") -> Memory:
    """Memory of one device, at the moments of a step that can be the fullest."""
    spec, width, parallel = model.spec, setting.compute_bytes, setting.parallel
    compiler = _COMPILERS[platform]
    counts = _counts(model, setting, compiler.tiles)
    master, tokens = setting.master_bytes, float(setting.tokens)
    state = {"parameters": master * counts.all, "moments": 2.0 * master * counts.all}
    batch = 5 * 4.0 * tokens * setting.accumulation + 3 * master * counts.copied  # weights and moments
    host = 0.0
    if setting.offload_optimizer != "none":
        host, state["moments"] = state["moments"], 0.0
    if setting.offload_optimizer == "all":
        host, state["parameters"] = host + state["parameters"], 0.0
    # Weights as they are used: all of them are cast before the first layer.
    cast = width * (counts.all + counts.padding) if width != master else 0.0
    accumulated = master * counts.all if setting.accumulation > 1 else 0.0
    saved, on_host = saved_bytes(spec, setting)
    host += on_host
    gathers = parallel.fsdp > 1
    table = width * counts.whole_table if gathers else 0.0
    # Over micro-batches the embedding is gathered once, before the first, and stays.
    embedding = table if setting.accumulation > 1 else 0.0
    both = table if spec.tie_embeddings else table + embedding
    # This layer and the next; XLA:CPU, which cannot reduce and scatter at once, has a layer's whole gradient as well.
    layer = (3 if platform == "cpu" else 2) * width * counts.whole_layer if gathers else 0.0
    logit = compiler.logit_bytes or width
    chunk = setting.chunk(spec, tpu=platform == "tpu")
    logits = (compiler.logits if chunk is None else compiler.chunk_logits) * logit * _outputs(spec, setting, chunk)
    chunked = 0.0 if chunk is None else _chunked_bytes(spec, setting, platform)
    working = working_bytes(spec, setting, scores=compiler.scores, cpu=platform == "cpu")
    # Between the products residuals are split over `tensor`; for each product the hidden states of all tokens come together,
    # and their gradients do: so many copies are alive at the head and in a layer (Llama 70B and 405B over tensor 4).  A loss in
    # chunks has its own hidden states and their gradients alone.
    together = tokens * spec.hidden_size * width if parallel.tensor > 1 else 0.0
    held = {**state, "activations": saved}
    gradients = width * counts.layers
    tables = width * counts.table
    return Memory(
        [
            moment("the loss", **held, gradients=accumulated + tables, logits=logits, weights_in_use=cast + both,
                   working=batch + (7.0 * together if chunk is None else chunked)),
            moment("the first layer that goes backward", **held, gradients=accumulated + gradients + tables,
                   weights_in_use=cast + layer + embedding, working=batch + working + 3.5 * together),
            moment("the end of the backward pass", **state, gradients=accumulated + gradients + 2 * tables,
                   weights_in_use=cast + table, working=batch + 2.0 * tokens * spec.hidden_size * width),
            moment("the update", **state, gradients=accumulated + gradients + tables, working=batch),
        ],
        host,
    )  # fmt: skip


def _outputs(spec: ModelSpec, setting: Setting, chunk: int | None) -> float:
    """Logits that exist at once on a device: of a language model's vocabulary, or of a classification's labels."""
    if spec.head.kind == "sequence-classification":
        return float(setting.micro_batch * spec.outputs)
    ways = 1 if spec.head.kind == "token-classification" else setting.parallel.tensor
    return float((setting.tokens if chunk is None else chunk) * -(-spec.outputs // ways))


def _chunked_bytes(spec: ModelSpec, setting: Setting, platform: Platform) -> float:
    """What a loss in chunks makes in the forward pass: the gradients of the hidden states and, over all chunks, of the head.

    XLA:CPU has a chunk's part of the head's gradient in a buffer of its own before it is added.
    """
    head = -(-spec.vocab_size // setting.parallel.tensor) * spec.hidden_size * (2 if platform == "cpu" else 1)
    return setting.master_bytes * head + float(setting.tokens) * spec.hidden_size * setting.compute_bytes


def _counts(model: Model, setting: Setting, tiles: tuple[int, int]) -> _Counts:
    mesh = setting.mesh_sizes
    held = [(rule, _elements(rule, mesh)) for rule in model.rules]
    gathered = [(rule, _elements(rule, {**mesh, "fsdp": 1})) for rule in model.rules]
    return _Counts(
        all=float(sum(size for _, size in held)),
        padding=float(sum(_padding(rule, mesh, tiles) for rule in model.rules)),
        copied=float(sum(_copied(rule, mesh, tiles) for rule in model.rules)),
        layers=float(sum(size for rule, size in held if rule.layers)),
        table=float(sum(size for rule, size in held if not rule.layers)),
        whole_layer=max(
            sum(size / rule.layers for rule, size in gathered if rule.layers and stack.holds(rule))
            for stack in stacks_of(model.spec, setting)
        ),
        whole_table=float(max(size for rule, size in gathered if "vocab" in axes_of(rule))),
    )


def _padding(rule: WeightRule, mesh: Mapping[str, int], tiles: tuple[int, int]) -> float:
    """Of projections from and to heads, whose last two dimensions, heads and their size, are not a whole number of tiles."""
    added = 0.0
    for axes, shape in zip(rule.axes, shards_of(rule, mesh), strict=True):
        if "head_dim" in axes and {"heads", "kv_heads"} & {*axes} and "embed" in axes:
            sizes = [size for axis, size in zip(axes, shape, strict=True) if axis in ("heads", "kv_heads", "head_dim")]
            padded = math.prod(_in_tiles(size, tile) for size, tile in zip(sizes, tiles, strict=True))
            added += math.prod(shape) * (padded / math.prod(sizes) - 1.0)
    return added


def _in_tiles(size: int, tile: int) -> int:
    """`size`, filled up to whole tiles; fewer than 8 rows have tiles of the next power of two."""
    return 1 << (size - 1).bit_length() if size < tile <= 8 else -(-size // tile) * tile


def _copied(rule: WeightRule, mesh: Mapping[str, int], tiles: tuple[int, int]) -> float:
    """Of a table whose rows are no whole number of tiles: the step gets it transposed, which is smaller, and copies it."""
    copied = 0.0
    for axes, shape in zip(rule.axes, shards_of(rule, mesh), strict=True):
        if "vocab" in axes and len(shape) > 1 and shape[-1] % tiles[1] and not shape[-2] % tiles[1]:
            copied += shape[-2] * _in_tiles(shape[-1], tiles[1])
    return copied


def _elements(rule: WeightRule, mesh: Mapping[str, int]) -> int:
    return sum(math.prod(shape) for shape in shards_of(rule, mesh))
