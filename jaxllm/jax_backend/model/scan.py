"""Running a stack of layers, in scans (`stack.Stretch`), so that compile time does not grow with their number.

Shape legend: B batch, S sequence, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.model.attention import CacheT, Context, KeyValue
from jaxllm.jax_backend.model.block import Block
from jaxllm.jax_backend.model.experts import Routing
from jaxllm.jax_backend.model.stack import Stretch, stretches
from jaxllm.jax_backend.model.tap import Points
from jaxllm.jax_backend.remat import Remat, named, rematerialised

# What a scan hands to each layer: weights, index, its part of the cache, keys and values of the source, offsets of its tap; and
# what comes back.
LayerInputs: TypeAlias = tuple[Any, jax.Array, Any, KeyValue | None, Points | None]
LayerOutputs: TypeAlias = tuple[Any, Points | None, Routing | None]


def run_layers(
    layers: Block,
    attentions: Sequence[AttentionSpec],
    x_BSE: jax.Array,
    context: Context,
    cache: CacheT,
    remat: Remat,
    memory: KeyValue | None = None,
) -> tuple[jax.Array, CacheT, Routing | None]:
    """All layers in order.  layers: their weights, stacked.  attentions: of each.  memory: of the source, of each layer."""
    graphdef, weights = nnx.split(layers, graph=False)

    def layer(attention: AttentionSpec, x_BSE: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, LayerOutputs]:
        weights, index, layer_cache, layer_memory, offsets = inputs
        key = None if context.key is None else jax.random.fold_in(context.key, index)
        tap = context.tap.of_layer(offsets)
        block = nnx.merge(graphdef, weights)
        x_BSE = named(x_BSE, "layer_input")
        own = context._replace(key=key, tap=tap)
        x_BSE, layer_cache, routing = block(x_BSE, attention, own, layer_cache, layer_memory)
        return x_BSE, (layer_cache, tap.records(), routing)

    indices = jnp.arange(len(attentions), dtype=jnp.int32)
    inputs = (weights, indices, cache, memory, context.tap.layer_offsets())
    outputs = []
    for stretch in stretches(attentions):
        x_BSE, output = _scan(layer, stretch, x_BSE, stretch.take(inputs), remat)
        outputs.append(output)
    joined = outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
    new_cache, records, routing = joined
    context.tap.keep_layers(records)
    return x_BSE, new_cache, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), routing)


def _scan(
    layer: Callable[..., tuple[jax.Array, LayerOutputs]], stretch: Stretch, x_BSE: jax.Array, inputs: LayerInputs, remat: Remat
) -> tuple[jax.Array, LayerOutputs]:
    """One stretch of layers.  Leaves of `inputs` are as `Stretch.take` gives them, of the outputs (layers, ...)."""
    if len(stretch.period) == 1:
        return jax.lax.scan(rematerialised(partial(layer, stretch.period[0]), remat), x_BSE, inputs)

    def at(place: int, attention: AttentionSpec, x_BSE: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, LayerOutputs]:
        # Picked here, within what is rematerialised: picked before, each layer's weights would be kept as activations.
        return layer(attention, x_BSE, jax.tree.map(lambda leaf: leaf[place], inputs))

    layers = [rematerialised(partial(at, *placed), remat) for placed in enumerate(stretch.period)]

    def period(x_BSE: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, LayerOutputs]:
        outputs = []
        for each in layers:
            x_BSE, output = each(x_BSE, inputs)
            outputs.append(output)
        return x_BSE, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

    x_BSE, outputs = jax.lax.scan(period, x_BSE, inputs)
    return x_BSE, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
