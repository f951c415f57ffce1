"""The ring that keys travel along, and which chunks of queries and keys meet at each of their visits.

Shape legend: B batch, S tokens of a device, C = S / 2 tokens of a chunk, N devices of the ring, H heads, K key/value heads,
G = H / K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility
from jaxllm.jax_backend.precision import Policy

RING = "context"
"""The mesh axis that keys and values travel along."""

TreeT = TypeVar("TreeT")
Visits = tuple[jax.Array, jax.Array]  # which chunk of queries meets which block of keys
Step = int | jax.Array
"""How often the keys have moved; 0, as a number, while they are at home."""


@dataclass(frozen=True)
class Ring:
    """One device's view of a ring of `devices`."""

    spec: AttentionSpec
    policy: Policy
    devices: int

    def onward(self, tree: TreeT) -> TreeT:
        """Every array given to the next device, and taken from the one before."""
        to_next = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        moved: TreeT = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, RING, to_next), tree)
        return moved

    def visits(self, step: Step, blocks: int) -> Visits:
        """What meets after `step` moves, when the keys of device (mine - step) mod N are here; `blocks` to a chunk.

        Of the four pairs of chunks, a causal mask leaves three at home.  Later it leaves two: the late chunk sees the other
        device's early chunk; besides, early sees early if the other comes before this device, else late sees late.
        """
        if not self.spec.causal:
            queries, keys = jnp.asarray([0, 0, 1, 1]), jnp.asarray([0, 1, 0, 1])
        elif isinstance(step, int) and step == 0:
            queries, keys = jnp.asarray([0, 1, 1]), jnp.asarray([0, 0, 1])
        else:
            kind = jnp.where(step <= jax.lax.axis_index(RING), 0, 1)
            queries, keys = jnp.stack([jnp.ones_like(kind), kind]), jnp.stack([jnp.zeros_like(kind), kind])
        of_chunk = keys[:, None] * blocks + jnp.arange(blocks)
        return jnp.repeat(queries, blocks), of_chunk.reshape(-1)


class Meeting(Protocol):
    """How a device's queries look at keys that come by, forward and backward.  Everything but `keys` stays on the device."""

    def queries(self, query_BSHD: jax.Array, kv_heads: int, visibility: Visibility) -> Any:
        """This device's queries as `look` wants them."""
        ...

    def keys(self, key_BSKD: jax.Array, value_BSKD: jax.Array, visibility: Visibility) -> Any:
        """This device's keys and values as they travel."""
        ...

    def look(self, ring: Ring, seen: Any, queries: Any, keys: Any, step: Step) -> Any:
        """What the queries have seen with these keys besides.  seen: so far; None at home, where everything begins."""
        ...

    def output(self, seen: Any) -> tuple[jax.Array, jax.Array]:
        """Mixed values (B, S, H, D) and the logsumexp of every query's scores (B, S, H), in the statistics dtype."""
        ...

    def pulled(self, mixed_BSHD: jax.Array, log_total_BSH: jax.Array, gradient_BSHD: jax.Array, kv_heads: int) -> Any:
        """What `pull` needs of the forward pass and of the gradient of its output."""
        ...

    def pull(self, ring: Ring, queries: Any, keys: Any, pulled: Any, step: Step) -> tuple[Any, Any]:
        """What these keys add to the gradients of the queries, and the gradients of the keys and values."""
        ...

    def gradients(self, to_queries: Any, to_keys: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of (B, S, H, D) and twice (B, S, K, D), from sums of what `pull` gave."""
        ...


def at(tree: TreeT, place: jax.Array) -> TreeT:
    """What stands at one place of the first axis of every leaf."""
    part: TreeT = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), tree)
    return part


def put(tree: TreeT, place: jax.Array, part: TreeT) -> TreeT:
    """`tree` with something else at one place."""
    whole: TreeT = jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, place, 0), tree, part)
    return whole


def cut_queries(x_BSHn: jax.Array, kv_heads: int) -> jax.Array:
    """(B, S, H, ...) -> (2, B, K, G, C, ...)."""
    batch, length, heads, *rest = x_BSHn.shape
    cut = x_BSHn.reshape(batch, 2, length // 2, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(cut, (1, 2), (0, 4))


def uncut_queries(x_2BKGCn: jax.Array) -> jax.Array:
    """The inverse of `cut_queries`."""
    moved = jnp.moveaxis(x_2BKGCn, (0, 4), (1, 2))
    batch, _, chunk, kv_heads, groups, *rest = moved.shape
    return moved.reshape(batch, 2 * chunk, kv_heads * groups, *rest)


def cut_keys(x_BSKD: jax.Array, size: int) -> jax.Array:
    """(B, S, K, D) -> (S / size, B, K, size, D)."""
    batch, length, kv_heads, head_dim = x_BSKD.shape
    return x_BSKD.reshape(batch, length // size, size, kv_heads, head_dim).transpose(1, 0, 3, 2, 4)


def uncut_keys(x_RBKTD: jax.Array) -> jax.Array:
    """The inverse of `cut_keys`."""
    blocks, batch, kv_heads, size, head_dim = x_RBKTD.shape
    return x_RBKTD.transpose(1, 0, 3, 2, 4).reshape(batch, blocks * size, kv_heads, head_dim)


def cut_segments(segments_BS: jax.Array | None, size: int) -> jax.Array | None:
    """(B, S) -> (S / size, B, size)."""
    return None if segments_BS is None else segments_BS.reshape(segments_BS.shape[0], -1, size).swapaxes(0, 1)
