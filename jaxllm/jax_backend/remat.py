"""Rematerialisation: what each layer keeps for its backward pass (`jaxllm.config.remat`), as a policy of `jax.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.config.remat import RematPolicy, kept_points

ATTENTION_MIXED: Final = "attention_mixed"
"""The point that attention kernels name themselves, since they know what their backward pass needs."""

HOST_MEMORY: Final = "pinned_host"
"""JAX's name of memory of the host that devices copy from and to by themselves."""

Remat = RematPolicy | tuple[str, ...]


def named(x: jax.Array, point: str) -> jax.Array:
    """`x`, which `jax.remat` may name.  A name leaves no trace in a compiled program."""
    same: jax.Array = checkpoint_name(x, point)
    return same


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, keeping what `remat` says.  For the body of a scan."""
    if remat == "none":
        return layer
    # A scan's body runs apart from its backward pass: no common subexpression could undo the recomputation.
    return jax.checkpoint(layer, policy=_policy(remat), prevent_cse=False)


def _policy(remat: Remat) -> Callable[..., Any]:
    policies: Any = jax.checkpoint_policies
    kept = kept_points(remat)
    if kept is None:
        policy = policies.nothing_saveable if remat == "full" else policies.dots_with_no_batch_dims_saveable
    elif kept.host:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(kept.device),
            names_which_can_be_offloaded=list(kept.host),
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
    else:
        policy = policies.save_only_these_names(*kept.device)
    return cast(Callable[..., Any], policy)
