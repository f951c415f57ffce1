"""Cross-entropy of a large vocabulary in chunks of tokens: the logits of all tokens never exist at once.

While the logits of a chunk are there, their gradient is made too, and goes at once into the gradients of the hidden states and
of the head's weight (as in Liger Kernel, arXiv:2410.10989).  So no product is computed twice, and nothing of the logits' size
waits for the backward pass, which only multiplies by the gradient of the loss.

On a mesh every device works on its own tokens and its own part of the vocabulary.  Between devices go, for each chunk, the
softmax's totals, and once for the whole loss the gradients.

Shape legend: B batch, S sequence, E hidden, V vocabulary (one device's part), T tokens of a device, N chunks, C tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.products import product, transposed, transposed_sums


class Tokens(NamedTuple):
    """Of every token (B, S): the hidden state (B, S, E) in the compute dtype, what follows it, and the weight of its loss."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


class Head(NamedTuple):
    """What makes logits of hidden states, in the compute dtype.  weight: (V, E) or (E, V).  bias: (V,)."""

    weight: jax.Array
    bias: jax.Array | None


@dataclass(frozen=True)
class Chunked:
    """What is known before any number is.

    axes: logical axes of the head's weight, `vocab` and `embed` in either order.  vocabulary: its entries; what the weight has
    beyond them fills it up.  softcap: logits l
    become softcap * tanh(l / softcap).  tokens: of a chunk.
    """

    axes: tuple[str, ...]
    vocabulary: int
    softcap: float | None
    tokens: int
    runtime: Runtime

    def ways(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes that really cut these logical axes."""
        return self.runtime.layout.ways(*logical)

    def cuts(self, logical: str, size: int) -> tuple[str, ...]:
        """The mesh axes along which a gradient of `size` is left cut; none where they do not divide it."""
        return () if size % self.runtime.layout.size(logical) else self.ways(logical)


def chunked_loss_sum(chunked: Chunked, tokens: Tokens, head: Head) -> jax.Array:
    """Sum over tokens of weight * (logsumexp(logits) - logit of the target), in nats, in the statistics dtype.

    Logits are rounded to the compute dtype, as they are without chunks.
    """
    tokens = tokens._replace(weights=tokens.weights.astype(chunked.runtime.policy.statistics))
    return _loss_sum(tokens, head, chunked)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _loss_sum(tokens: Tokens, head: Head, chunked: Chunked) -> jax.Array:
    loss: jax.Array = _on_mesh(_loss_on_device, chunked, tokens, head)
    return loss


def _forward(tokens: Tokens, head: Head, chunked: Chunked) -> tuple[jax.Array, tuple[jax.Array, Head]]:
    found: tuple[jax.Array, tuple[jax.Array, Head]] = _on_mesh(_gradients_on_device, chunked, tokens, head)
    return found


def _backward(chunked: Chunked, gradients: tuple[jax.Array, Head], gradient: jax.Array) -> tuple[Tokens, Head]:
    statistics = chunked.runtime.policy.statistics
    scaled = jax.tree.map(lambda leaf: (leaf.astype(statistics) * gradient).astype(leaf.dtype), gradients)
    to_hidden, to_head = scaled
    no_gradient: Any = None  # of labels and their weights
    return Tokens(to_hidden, no_gradient, no_gradient), to_head


_loss_sum.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------------------------ on a mesh


def _on_mesh(function: Callable[..., Any], chunked: Chunked, tokens: Tokens, head: Head) -> Any:
    """`function` of each device's part of its arguments: the weight whole along `embed`, and cut along `vocab`."""
    layout = chunked.runtime.layout
    if layout.mesh.size == 1:
        return function(chunked, tokens, head)
    of_tokens = layout.spec("batch", "sequence")
    hidden = layout.spec("batch", "sequence", None)
    whole = layout.spec(*("vocab" if axis == "vocab" else None for axis in chunked.axes))
    bias = None if head.bias is None else layout.spec("vocab")
    length, size = tokens.hidden.shape[1] // layout.size("sequence"), tokens.hidden.shape[2]
    to_hidden = layout.spec("batch", "residual", None) if chunked.cuts("vocab", length) else hidden
    to_weight = layout.spec(*chunked.axes) if chunked.cuts("embed", size) else whole
    loss = PartitionSpec()
    mapped = jax.shard_map(
        partial(function, chunked),
        mesh=layout.mesh,
        in_specs=(Tokens(hidden, of_tokens, of_tokens), Head(whole, bias)),  # type: ignore[arg-type]
        out_specs=loss if function is _loss_on_device else (loss, (to_hidden, Head(to_weight, bias))),  # type: ignore[arg-type]
        check_vma=False,
    )
    return mapped(tokens, head)


def _loss_on_device(chunked: Chunked, tokens: Tokens, head: Head) -> jax.Array:
    def one(total: jax.Array, chunk: Tokens) -> tuple[jax.Array, None]:
        return total + _chunk(chunked, chunk, head)[0], None

    total, _ = jax.lax.scan(one, jnp.zeros((), tokens.weights.dtype), _cut(chunked, tokens))
    return _sum(total, chunked.ways("batch", "sequence"))


def _gradients_on_device(chunked: Chunked, tokens: Tokens, head: Head) -> tuple[jax.Array, tuple[jax.Array, Head]]:
    policy, statistics = chunked.runtime.policy, tokens.weights.dtype
    vocab = chunked.axes.index("vocab")

    def one(sums: tuple[jax.Array, Head], chunk: Tokens) -> tuple[tuple[jax.Array, Head], jax.Array]:
        total, (to_weight, to_bias_V) = sums
        loss, gradient_CV = _chunk(chunked, chunk, head)
        to_bias_V = None if to_bias_V is None else to_bias_V + jnp.sum(gradient_CV, axis=0)
        gradient_CV = gradient_CV.astype(policy.compute)
        to_hidden_CE = product(gradient_CV, head.weight, 1, vocab, policy).astype(policy.compute)
        to_weight += _to_weight(chunked, chunk.hidden, gradient_CV)
        return (total + loss, Head(to_weight, to_bias_V)), to_hidden_CE

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, statistics), head)
    (total, to_head), to_hidden_NCE = jax.lax.scan(one, (jnp.zeros((), statistics), zeros), _cut(chunked, tokens))
    length, size = tokens.hidden.shape[1:]
    to_hidden_BSE = to_hidden_NCE.reshape(-1, size)[: tokens.targets.size].reshape(tokens.hidden.shape)
    to_head = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), to_head, head)
    rows = chunked.ways("batch", "sequence")
    to_weight = _reduced(to_head.weight, rows, chunked.cuts("embed", size), axis=1 - vocab)
    to_bias_V = None if to_head.bias is None else _sum(to_head.bias, rows)
    to_hidden_BSE = _reduced(to_hidden_BSE, chunked.ways("vocab"), chunked.cuts("vocab", length), axis=1)
    # The backward pass of the layers waits for the head's gradient to be added up over devices.  XLA:TPU else puts that off
    # until they are done, and keeps the whole gradient in float32 all the while (2 GiB of Llama 3 8B).
    to_hidden_BSE, to_weight = jax.lax.optimization_barrier((to_hidden_BSE, to_weight))
    return _sum(total, rows), (to_hidden_BSE, Head(to_weight, to_bias_V))


def _sum(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    summed: jax.Array = jax.lax.psum(x, mesh_axes) if mesh_axes else x
    return summed


def _reduced(x: jax.Array, over: tuple[str, ...], cuts: tuple[str, ...], axis: int) -> jax.Array:
    """The sum over devices along the mesh axes `over`; along those of `cuts` each keeps its part of `axis` (reduce-scatter)."""
    x = _sum(x, tuple(name for name in over if name not in cuts))
    for name in cuts:
        x = jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    return x


# ---------------------------------------------------------------------------------------------------------------- on a device


def _cut(chunked: Chunked, tokens: Tokens) -> Tokens:
    """(N, C, ...) of each, filled up with tokens that weigh nothing."""
    count = tokens.targets.size
    chunks = -(-count // chunked.tokens)
    missing = -count % chunks

    def cut(part_BS: jax.Array) -> jax.Array:
        part_T = part_BS.reshape(-1, *part_BS.shape[2:])
        if missing:
            part_T = jnp.pad(part_T, [(0, missing), *((0, 0) for _ in part_T.shape[1:])])
        return part_T.reshape(chunks, -1, *part_T.shape[1:])

    chunks_of: Tokens = jax.tree.map(cut, tokens)
    return chunks_of


def _chunk(chunked: Chunked, chunk: Tokens, head: Head) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses, and their gradient with respect to the head's product (C, V), both in the statistics dtype."""
    logits_CV, slope_CV = _logits(chunked, chunk.hidden, head)
    ways = chunked.ways("vocab")
    column_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
    for name in ways:
        column_CV += jax.lax.axis_index(name) * logits_CV.shape[1]
    if logits_CV.shape[1] * chunked.runtime.layout.size("vocab") > chunked.vocabulary:
        logits_CV = jnp.where(column_CV < chunked.vocabulary, logits_CV, -jnp.inf)
    # Compared rather than indexed: see `jaxllm.jax_backend.loss.token_loss_sum`.
    is_target_CV = column_CV == chunk.targets[:, None]
    largest_C1 = jnp.max(logits_CV, axis=1, keepdims=True)
    if ways:
        largest_C1 = jax.lax.pmax(largest_C1, ways)
    powers_CV = jnp.exp(logits_CV - largest_C1)
    picked_C1 = jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=1, keepdims=True)
    total_C1, picked_C1 = _sum(jnp.stack([jnp.sum(powers_CV, axis=1, keepdims=True), picked_C1]), ways)
    weights_C1 = chunk.weights[:, None]
    loss = jnp.sum((jnp.log(total_C1) + largest_C1 - picked_C1) * weights_C1)
    gradient_CV = (powers_CV / total_C1 - is_target_CV) * weights_C1
    return loss, gradient_CV if slope_CV is None else gradient_CV * slope_CV


def _to_weight(chunked: Chunked, hidden_CE: jax.Array, gradient_CV: jax.Array) -> jax.Array:
    """What the chunk adds to the gradient of the head's weight."""
    policy, vocab_first = chunked.runtime.policy, chunked.axes[0] == "vocab"
    if chunked.runtime.layout.platform == "cpu" and chunked.runtime.layout.mesh.size == 1:
        sums_EV = product(transposed(hidden_CE), gradient_CV, 1, 0, policy)
        return transposed_sums(sums_EV) if vocab_first else sums_EV
    return product(*((gradient_CV, hidden_CE) if vocab_first else (hidden_CE, gradient_CV)), 0, 0, policy)


def _logits(chunked: Chunked, hidden_CE: jax.Array, head: Head) -> tuple[jax.Array, jax.Array | None]:
    """Logits (C, V) in the statistics dtype, and the slope of what caps them."""
    policy, cap = chunked.runtime.policy, chunked.softcap
    logits_CV = product(hidden_CE, head.weight, 1, chunked.axes.index("embed"), policy).astype(policy.compute)
    if head.bias is not None:
        logits_CV = logits_CV + head.bias
    if cap is None:
        return logits_CV.astype(policy.statistics), None
    logits_CV = (jnp.tanh(logits_CV / cap) * cap).astype(policy.statistics)
    return logits_CV, 1.0 - jnp.square(logits_CV / cap)
